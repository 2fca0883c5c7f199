// How does a processor with AMX multiply rows of W and a panel of x? In tiles: registers of 16 rows of 64 bytes, which one
// instruction multiplies. UNPROVEN: no processor has run this, so it runs only if it is forced.
//
// A tile of W is 16 of its rows, 16 lanes of K each (multiply.h), as they lie in memory. A tile of x is 16 lanes of K of one
// vector of a panel: 16 rows of x. Two tiles of W times two of x take 4 loads for 4 products. A load takes 8 cycles and a product
// 16, so products set the pace.
//
// A machine that builds this may lack the instructions. So tests/dot_on_cpu/tiles.h gives their documented arithmetic.
#pragma once

#include "multiply.h"

namespace pyfused::PYFUSED_ISA {

// out[r][i], rows ld apart, (+)= the sums over 16 `steps` lanes for 32 rows of W, `apart` bytes apart, and V vectors of a panel.
template <class M, int V>
void multiply_tiles(const lane32* w, int64_t apart, const float* panel, int64_t steps, float* out, int64_t ld, bool first);

#if defined(__AMX_TILE__) || defined(PYFUSED_EMULATED_TILES)

constexpr bool kTiles = true;
constexpr int kTileRows = 16;
static_assert(kWidth == kTileRows, "a vector is a row of a tile");

// All eight tiles have 16 rows of 64 bytes: what W or x lacks is zeros.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64, "what ldtilecfg reads");

// While one lives, its thread may use tiles. A thread that keeps them pays for it at every switch, and other code sets its own.
class TilesInUse {
  static constexpr TileShapes kShapes{};  // constant: GCC 12 says that ldtilecfg reads 8 bytes, and would not store the others

 public:
  TilesInUse() { _tile_loadconfig(&kShapes); }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
};

// The registers are numbers in an instruction's name: 0 to 3 sum, 4 and 5 hold W, 6 and 7 hold x.
#define PYFUSED_TILE_PRODUCT(sum, w, x)                              \
  if constexpr (M::kGroup == 2) { _tile_dpbf16ps(sum, w, x); }       \
  else { _tile_dpbsud(sum, w, x); }

template <class M, int V>
inline void multiply_tiles(const lane32* w, int64_t apart, const float* panel, int64_t steps, float* out, int64_t ld, bool first) {
  constexpr int64_t kRow = V * kWidth * sizeof(float);
  const char *upper = (const char*)w, *lower = upper + kTileRows * apart, *x = (const char*)panel;
  float* below = out + kTileRows * ld;
  const int64_t row = ld * sizeof(float);
  asm volatile("" ::: "memory");  // GCC 12 does not know that a tile's load reads memory: what is stored must be there
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, out, row);
    _tile_loadd(2, below, row);
    if constexpr (V == 2) {
      _tile_loadd(1, out + kWidth, row);
      _tile_loadd(3, below + kWidth, row);
    }
  }
  for (int64_t s = 0; s < steps; ++s, upper += 64, lower += 64, x += kTileRows * kRow) {
    _tile_loadd(4, upper, apart);
    _tile_loadd(6, x, kRow);
    PYFUSED_TILE_PRODUCT(0, 4, 6)
    _tile_loadd(5, lower, apart);
    PYFUSED_TILE_PRODUCT(2, 5, 6)
    if constexpr (V == 2) {
      _tile_loadd(7, x + kRow / 2, kRow);
      PYFUSED_TILE_PRODUCT(1, 4, 7)
      PYFUSED_TILE_PRODUCT(3, 5, 7)
    }
  }
  _tile_stored(0, out, row);
  _tile_stored(2, below, row);
  if constexpr (V == 2) {
    _tile_stored(1, out + kWidth, row);
    _tile_stored(3, below + kWidth, row);
  }
}

#else
constexpr bool kTiles = false;
struct TilesInUse { TilesInUse() {} };
#endif

}  // namespace pyfused::PYFUSED_ISA
