// The matrix instructions of a warp (9.7.14).
#include "emulate_mma.h"

#include "emulate_block.h"

namespace emulate {

// 9.7.14.5.15: thread i gives row i % 8 of matrix i / 8, and gets row i / 4, elements 2 (i % 4) and the next, of each;
// transposed: column i / 4, rows 2 (i % 4) and the next.
void load_matrices(uint32_t (&r)[4], const void* shared_row, bool transposed) {
  require(reinterpret_cast<uintptr_t>(shared_row) % 16 == 0, "ldmatrix: a row's address is a multiple of 16");
  require(in_shared(shared_row, 16), "ldmatrix: the row is not in the dynamic shared memory");
  struct Argument {
    const void* row;
    uint32_t* r;
    bool transposed;
  } argument{shared_row, r, transposed};
  meet(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", argument, [](Argument*(&lanes)[32]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int row = 0; row < 8; ++row) std::memcpy(element[row], lanes[matrix * 8 + row]->row, 16);
      for (int i = 0; i < 32; ++i) {
        const int major = i / 4, minor = 2 * (i % 4);
        const uint16_t low = lanes[i]->transposed ? element[minor][major] : element[major][minor];
        const uint16_t high = lanes[i]->transposed ? element[minor + 1][major] : element[major][minor + 1];
        lanes[i]->r[matrix] = static_cast<uint32_t>(high) << 16 | low;
      }
    }
  });
}

// --- elements, rows and sums ----------------------------------------------------------------------------------------

Rows dense_rows(const uint8_t (&bytes)[16][32], Element type) {
  Rows rows;
  rows.count = 32 / element_bytes(type);
  for (int i = 0; i < rows.count; ++i)
    for (int row = 0; row < 16; ++row) rows.value[i][row] = widened(&bytes[row][i * element_bytes(type)], type);
  return rows;
}

namespace {

// The four bits of group `group` of row `row`: of halves, lanes 2 selector and the next of each four have 16 k each of
// rows g and, above, g + 8; of bytes, lanes 2c and 2c + 1 have 32 k of row g and of row g + 8.
uint32_t group_bits(const uint32_t (&metadata)[32], Element type, int selector, int row, int group) {
  const int four = row % 8 * 4;
  if (type == Element::s8) return metadata[four + group / 8 * 2 + row / 8] >> group % 8 * 4 & 15;
  return metadata[four + selector * 2 + group / 4] >> (row / 8 * 16 + group % 4 * 4) & 15;
}

}  // namespace

Rows sparse_rows(const uint8_t (&bytes)[16][32], Element type, const uint32_t (&metadata)[32], int selector) {
  require(selector == 0 || (selector == 1 && type != Element::s8), "a sparsity selector that the instruction has not");
  Rows rows = dense_rows(bytes, type);
  rows.sparse = true;
  for (int row = 0; row < 16; ++row)
    for (int group = 0; group < rows.count / 2; ++group) {
      const uint32_t bits = group_bits(metadata, type, selector, row, group);
      const int first = static_cast<int>(bits & 3), second = static_cast<int>(bits >> 2);
      if (first >= second)
        fail("metadata of row " + std::to_string(row) + ", group " + std::to_string(group) + ": the positions " +
             std::to_string(first) + " and " + std::to_string(second) + " do not ascend");
      rows.k[2 * group][row] = 4 * group + first;
      rows.k[2 * group + 1][row] = 4 * group + second;
    }
  return rows;
}

void multiply(const Rows& rows, const double* column, Sixteen& products) {
  Sixteen sums = {};
  for (int i = 0; i < rows.count; ++i)
    if (rows.sparse)
      for (int row = 0; row < 16; ++row) sums[row] += rows.value[i][row] * column[rows.k[i][row]];
    else
      sums += rows.value[i] * column[i];
  products = sums;
}

// --- mma.m16n8 (9.7.14.5, 9.7.14.6) ---------------------------------------------------------------------------------

namespace {

struct MmaArgument {
  void* c;
  const uint32_t *a, *b;
  Element type;
  bool sparse;
  int selector;
  uint32_t metadata;
};

// What all shapes share: with g = lane / 4, t = lane % 4, register 0 of A is of row g and the lower 16 bytes of k, 1 of
// row g + 8, 2 and 3 of the upper 16; register i of B is of column g and bytes 16 i of k and on; of 16 bytes, a thread
// has 4t to 4t + 3. C: rows g, g, g + 8, g + 8, columns 2t, 2t + 1, 2t, 2t + 1.
void execute(MmaArgument* (&lanes)[32]) {
  const Element type = lanes[0]->type;
  const int parts = lanes[0]->sparse ? 4 : 2, bytes = element_bytes(type);
  uint8_t a[16][32], b[8][64];
  uint32_t metadata[32];
  for (int i = 0; i < 32; ++i) {
    const int group = i / 4, begin = i % 4 * 4;
    for (int part = 0; part < 4; ++part)
      std::memcpy(&a[group + part % 2 * 8][part / 2 * 16 + begin], &lanes[i]->a[part], 4);
    for (int part = 0; part < parts; ++part) std::memcpy(&b[group][part * 16 + begin], &lanes[i]->b[part], 4);
    metadata[i] = lanes[i]->metadata;
  }
  const Rows rows = lanes[0]->sparse ? sparse_rows(a, type, metadata, lanes[0]->selector) : dense_rows(a, type);
  for (int column = 0; column < 8; ++column) {
    double values[64];
    Sixteen products;
    for (int k = 0; k < parts * 16 / bytes; ++k) values[k] = widened(&b[column][k * bytes], type);
    multiply(rows, values, products);
    for (int row = 0; row < 16; ++row) {
      auto* c = static_cast<uint8_t*>(lanes[row % 8 * 4 + column / 2]->c) + (row / 8 * 2 + column % 2) * 4;
      uint32_t sum;
      std::memcpy(&sum, c, 4);
      sum = added(sum, products[row], type);
      std::memcpy(c, &sum, 4);
    }
  }
}

}  // namespace

void mma(void* c, const uint32_t (&a)[4], const uint32_t (&b)[2], Element type) {
  constexpr const char* kNames[] = {"mma.m16n8k32.s8", "mma.m16n8k16.f16", "mma.m16n8k16.bf16"};
  MmaArgument argument{c, a, b, type, false, 0, 0};
  meet(~0u, kNames[static_cast<int>(type)], argument, [](MmaArgument*(&lanes)[32]) { execute(lanes); });
}

void mma_sp(void* c, const uint32_t (&a)[4], const uint32_t (&b)[4], Element type, int selector, uint32_t metadata) {
  constexpr const char* kNames[2][3] = {
      {"mma.sp.m16n8k64.s8", "mma.sp.m16n8k32.f16", "mma.sp.m16n8k32.bf16"},
      {"mma.sp.m16n8k64.s8", "mma.sp.m16n8k32.f16 of selector 1", "mma.sp.m16n8k32.bf16 of selector 1"}};
  MmaArgument argument{c, a, b, type, true, selector, metadata};
  meet(~0u, kNames[selector != 0][static_cast<int>(type)], argument, [](MmaArgument*(&lanes)[32]) { execute(lanes); });
}

}  // namespace emulate
