// Marks what nvcc compiles for the device too.
#pragma once

#if defined(__CUDACC__)
#define PYCOMPRESS_HOST_DEVICE __host__ __device__
#else
#define PYCOMPRESS_HOST_DEVICE
#endif
