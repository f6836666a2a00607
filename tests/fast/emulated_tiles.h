// AMX's instructions, and the system's permission for them, in plain C++: cpu.cpp compiled with this before it has its
// path for AMX on any processor with AVX-512 BF16. Tiles hold what the processor's would; a thread that has not shaped
// its tiles, or asks for other than 16 rows of 64 bytes, ends the process.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

inline thread_local Config config = {};
inline thread_local uint8_t tiles[8][16][64];

inline void load_config(const void* from) {
  std::memcpy(&config, from, sizeof(config));
  std::memset(tiles, 0, sizeof(tiles));
}

inline void store_config(void* to) { std::memcpy(to, &config, sizeof(config)); }

inline void expect_shaped(int tile) {
  if (config.palette != 1 || config.rows[tile] != 16 || config.row_bytes[tile] != 64) std::abort();
}

inline void load(int tile, const void* from, int64_t stride) {
  expect_shaped(tile);
  for (int row = 0; row < 16; ++row) std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int tile, void* to, int64_t stride) {
  expect_shaped(tile);
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], 64);
}

inline float widened(const uint8_t* bf16) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, bf16, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// to (16, 16) floats += rows (16, 32) times columns, of whose rows k the pairs (2k, 2k + 1) of 16 columns lie in one.
inline void multiply_add(int to, int rows, int columns) {
  for (int tile : {to, rows, columns}) expect_shaped(tile);
  for (int m = 0; m < 16; ++m) {
    float sums[16];
    std::memcpy(sums, tiles[to][m], 64);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int pair = 0; pair < 2; ++pair)
          sums[n] += widened(tiles[rows][m] + 4 * k + 2 * pair) * widened(tiles[columns][k] + 4 * n + 2 * pair);
    std::memcpy(tiles[to][m], sums, 64);
  }
}

inline long permit(long, long, long) { return 0; }

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_storeconfig emulated::store_config
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_add
#define syscall emulated::permit
#undef __AMX_BF16__
#define __AMX_BF16__ 1
