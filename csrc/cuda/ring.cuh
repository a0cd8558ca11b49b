// What the kernels for compute capability 9.0 have in common: a ring of stages in shared memory that one thread fills
// by the tensor memory accelerator, and two warp groups that multiply what lies in it.
//
// The phases of a stage, of which `full` and `empty` are the mbarriers:
//   the producer waits until all consumers have left it (empty), announces its bytes and starts the copies; these
//   arrive at full, in each block of the cluster that gets them; the consumers wait there, issue their products, and
//   leave the stage when the products are done.
#pragma once

#include "hopper.cuh"

namespace pycompress::gpu {
namespace {

constexpr int kGroupThreads = 128, kConsumerGroups = 2;  // of a warp group; that multiply
constexpr int kConsumerWarps = kConsumerGroups * kGroupThreads / 32;
constexpr int kRingThreads = (1 + kConsumerGroups) * kGroupThreads;  // of a block
constexpr int kMaxRingShared = 227 * 1024;
// Of the 65536 registers, a producer thread needs few. The launch gives each thread 168.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// A place in the ring: the stage, and the parity of its present round.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <int kStagesOf, int kStageBytesOf>
struct Ring {
  static constexpr int kStages = kStagesOf, kStageBytes = kStageBytesOf;
  static constexpr int kBytes = kStages * kStageBytes, kBarrierBytes = 2 * kStages * 8;
  static_assert(kStages >= 2 && kStageBytes % 1024 == 0);

  uint8_t* const stages;
  uint64_t *const full, *const empty;

  // shared: kBytes, aligned to 1024; barriers: kBarrierBytes, aligned to 8.
  __device__ Ring(uint8_t* shared, uint8_t* barriers)
      : stages(shared),
        full(reinterpret_cast<uint64_t*>(barriers)),
        empty(reinterpret_cast<uint64_t*>(barriers) + kStages) {}

  // One thread; the block (the cluster) synchronizes after it. leaving: the arrivals that empty a stage, those of all
  // blocks of the cluster.
  __device__ void init(uint32_t leaving) const {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(full + i, 1);
      init_barrier(empty + i, leaving);
    }
    publish_barriers();
  }
  __device__ uint8_t* stage(int i) const { return stages + i * kStageBytes; }

  // The producer, before it fills a stage: waits until it is empty and announces all of its bytes.
  __device__ uint64_t* claim(const Place<kStages>& at) const {
    wait(empty + at.stage, at.parity ^ 1);
    arrive_expecting(full + at.stage, kStageBytes);
    return full + at.stage;
  }
  // A consumer's warp has done with a stage: once a warp, at every block that copies into it.
  template <int kCluster = 1>
  __device__ void leave(int stage) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane >= kCluster) return;
    if constexpr (kCluster == 1)
      arrive(empty + stage);
    else
      arrive_at(empty + stage, static_cast<uint32_t>(lane));
  }
};

// All kRingThreads threads of a block: one thread of the first group runs produce(), all of the others consume().
template <class Produce, class Consume>
__device__ inline void split_groups(Produce&& produce, Consume&& consume) {
  if (threadIdx.x < kGroupThreads) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce();
  } else {
    take_registers<kConsumerRegisters>();
    consume();
  }
}
// Of a consumer: its warp (0 to kConsumerWarps - 1), and its group.
__device__ inline int consumer_warp() { return static_cast<int>(threadIdx.x) / 32 - kGroupThreads / 32; }
__device__ inline int consumer_group() { return consumer_warp() / 4; }

}  // namespace
}  // namespace pycompress::gpu
