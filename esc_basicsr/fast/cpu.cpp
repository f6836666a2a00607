// ESC's layers for a CPU: what torch's operators do in several passes over memory is done in the cache.
//
// In float32; and, where the processor has AVX-512 BF16, with the factors of matrix products in bfloat16, by AMX where it
// has that. Sums, softmax, normalisation and GELU are in float32 then, too.
//
// Plain C++ with the vector extensions that GCC and Clang share, so that one text serves any instruction set.
// Maps are laid out channels last, (B, H, W, C). The caller has checked shapes. Each function returns 0, or 1 if there
// was no memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include <omp.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kQueries = 8;  // rows of scores at a time: as many as the registers hold
constexpr int kPixels = 6;   // rows of a matrix product at a time
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kQueries = 4;
constexpr int kPixels = 3;
#else
constexpr int kLanes = 4;
constexpr int kQueries = 4;
constexpr int kPixels = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

// A bfloat16: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f;

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }

inline Vec fill(float value) { return value - Vec{}; }

// How factors of type T are multiplied. A lane multiplies kTogether pairs of them and adds the products to a float, so
// what is summed over lies kTogether by kTogether in memory: a factor for all lanes is kTogether numbers, a vector of
// factors (kLanes, kTogether).
template <typename T>
struct Products;

template <>
struct Products<float> {
  static constexpr int kTogether = 1;
  typedef Vec Factors;
};

inline Vec load_factors(const float* from) { return load(from); }
inline void store_factors(float* to, Vec v) { store(to, v); }
inline Vec multiply_add(Vec total, const float* same, Vec factors) { return total + *same * factors; }
inline void round_to(float* to, float value) { *to = value; }

#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
#define ESC_BF16 1

template <>
struct Products<Bf16> {
  static constexpr int kTogether = 2;
  typedef __m512bh Factors;
};

inline __m512bh load_factors(const Bf16* from) {
  __m512bh v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline void store_factors(Bf16* to, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  std::memcpy(to, &rounded, sizeof(rounded));
}

inline Vec multiply_add(Vec total, const Bf16* same, __m512bh factors) {
  int32_t pair;
  std::memcpy(&pair, same, sizeof(pair));
  return _mm512_dpbf16_ps(total, (__m512bh)_mm512_set1_epi32(pair), factors);
}

// (16 numbers), (16 numbers) -> (16, 2)
inline void interleave(__m256i first, __m256i second, Bf16* to) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(first), high);
  std::memcpy(to, &pairs, sizeof(pairs));
}

// To the nearest, to the even one of two; not-a-number stays so.
inline void round_to(Bf16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? nearest : 0x7fc0);
}
#endif

// Of a number and not-a-number, the second argument. GCC makes two instructions of the plain form.
#if defined(__AVX512F__)
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX__)
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#else
inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
#endif

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline float largest(Vec v) {
  float value = v[0];
  for (int i = 1; i < kLanes; ++i) value = std::max(value, v[i]);
  return value;
}

// 2^x for x <= 0, relative error 3e-7; what is below the least normal number becomes about that number.
inline Vec exp2_negative(Vec x) {
  x = vmax(fill(-126.0f), x);
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves the integer in the low bits
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = fill(0.0013266970636323094f);
  p = p * f + 0.009675459936261177f;
  p = p * f + 0.05550742521882057f;
  p = p * f + 0.24022121727466583f;
  p = p * f + 0.6931469440460205f;
  p = p * f + 1.0f;
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

// 2^x for x <= 0 as a factor of type T needs it.
template <typename T>
inline Vec exp2_of(Vec x) {
  return exp2_negative(x);
}

#if defined(ESC_BF16)
template <>
inline Vec exp2_of<Bf16>(Vec x) {  // relative error 8e-5
  const Vec f = _mm512_reduce_ps(x, 9);  // x less the integer below it
  Vec p = fill(0.07802452004188971f);
  p = p * f + 0.22606715912641914f;
  p = p * f + 0.6958335392244055f;
  p = p * f + 0.9999252186224673f;
  return _mm512_scalef_ps(p, x);
}
#endif

constexpr int kGeluTerms = 15;
constexpr float kGeluEnd = 5.25f;
// Least squares at Chebyshev's points of [-1, 1], lowest power first.
constexpr float kGelu[kGeluTerms] = {
    0.13465934991836548f, -0.0671268105506897f, 0.04964572191238403f, -0.039763666689395905f,
    0.032032594084739685f, -0.025039661675691605f, 0.01853097416460514f, -0.0127838971093297f,
    0.008441951125860214f, -0.005432670004665852f, 0.0028538790065795183f, -0.0010533645981922746f,
    0.0006950204842723906f, -0.0006519745220430195f, 0.0002306388778379187f};

// (1 + erf(x / sqrt 2)) / 2: half of erf is x times a polynomial of x^2 up to kGeluEnd, and constant from there.
inline Vec normal_cdf(Vec x) {
  const Vec clipped = vmin(fill(kGeluEnd), vmax(fill(-kGeluEnd), x));
  const Vec u = clipped * clipped * (2 / (kGeluEnd * kGeluEnd)) - 1.0f;
  Vec p = fill(kGelu[kGeluTerms - 1]);
  for (int i = kGeluTerms - 2; i >= 0; --i) p = p * u + kGelu[i];
  return clipped * p + 0.5f;
}

// Error at most 7e-7 for |x| < 8 and 1e-7 of |x| beyond.
inline Vec gelu(Vec x) { return x * normal_cdf(x); }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scratch memory of a thread, aligned to a vector.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + kLanes]), next_(memory_.get()) {
    const auto address = reinterpret_cast<uintptr_t>(next_);
    next_ += (round_up(address, sizeof(Vec)) - address) / sizeof(float);
  }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += round_up(floats, kLanes);
    return taken;
  }
  template <typename T>
  T* take_as(int64_t numbers) {  // of no more bytes than a float
    return reinterpret_cast<T*>(take(numbers));
  }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

std::vector<Scratch> scratch_for(int threads, int64_t floats) {
  std::vector<Scratch> scratches;
  for (int i = 0; i < threads; ++i) scratches.emplace_back(floats);
  return scratches;
}

// ---------------------------------------------------------------------------------------------------- tiles

#if defined(ESC_BF16) && defined(__AMX_BF16__) && defined(__linux__)
#define ESC_TILES 1

// AMX has eight tiles of 16 rows of 64 bytes. It adds (16, 32) bfloat16 times (32, 16) bfloat16 to (16, 16) floats; of the
// second factor a tile's row is (16, 2), two numbers of each column.
constexpr int kTile = 16;          // rows of a tile; floats in a row
constexpr int kTileDepth = 32;     // bfloat16 in a row
constexpr int kBlock = 2 * kTile;  // rows and columns of a product at a time: each tile that is loaded is used twice

// Whether the system lets this process use tiles, for which Linux wants to be asked.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool is_permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return is_permitted;
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
constexpr TileShapes kTileShapes;

// A second factor as tiles want it: (columns / kTile, depth / 2, kTile, 2), each tile in one piece. An object shapes the
// thread's tiles, and gives them their former shapes at its end: PyTorch uses them, too.
struct AmxTiles {
  static constexpr int kDepth = kTileDepth;
  static int64_t at(int64_t d, int64_t column, int64_t depth, int64_t) {
    return (column / kTile * depth + d / 2 * 2) * kTile + column % kTile * 2 + d % 2;
  }

  AmxTiles() {
    _tile_storeconfig(&former);
    _tile_loadconfig(&kTileShapes);
  }
  ~AmxTiles() { _tile_loadconfig(&former); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  alignas(64) uint8_t former[sizeof(TileShapes)];
};

// to[row][column] = start[row][column] + sum over d < depth of rows[row][d] * packed[d][column], for kBlock rows and as
// many columns, or half of them. Row strides are in numbers; strip: numbers between packed's tiles of columns.
inline void multiply_tiles(const Bf16* rows, int64_t stride, const Bf16* packed, int64_t strip, int64_t depth,
                           bool is_half, const float* start, int64_t start_stride, float* to, int64_t to_stride) {
  // Loads do not tell the compiler what they read.
  asm volatile("" ::: "memory");
  const int64_t start_bytes = start_stride * 4, bytes = stride * 2, to_bytes = to_stride * 4, tile_bytes = kTileDepth * 2;
  // The sums are tiles 0 and 1, below them 2 and 3; the rows 4 and below it 5; packed 6 and beside it 7.
  _tile_loadd(0, start, start_bytes);
  _tile_loadd(2, start + kTile * start_stride, start_bytes);
  if (!is_half) {
    _tile_loadd(1, start + kTile, start_bytes);
    _tile_loadd(3, start + kTile * start_stride + kTile, start_bytes);
  }
  for (int64_t d = 0; d < depth; d += kTileDepth) {
    _tile_loadd(4, rows + d, bytes);
    _tile_loadd(5, rows + kTile * stride + d, bytes);
    _tile_loadd(6, packed + d * kTile, tile_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (is_half) continue;
    _tile_loadd(7, packed + strip + d * kTile, tile_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, to_bytes);
  _tile_stored(2, to + kTile * to_stride, to_bytes);
  if (is_half) return;
  _tile_stored(1, to + kTile, to_bytes);
  _tile_stored(3, to + kTile * to_stride + kTile, to_bytes);
}
#endif

// ---------------------------------------------------------------------------------------- window attention

struct Attention {
  int64_t batch, rows, columns, window, heads, channels;  // rows and columns of windows; channels of a head

  int64_t keys() const { return window * window; }
  int64_t padded_keys() const { return round_up(keys(), 2 * kLanes); }
  // Rows of scores: not a power of two apart, which would crowd them into a few sets of the cache.
  int64_t score_stride() const { return padded_keys() + kLanes; }
  int64_t padded_channels() const { return round_up(channels, kLanes); }
  int64_t dim() const { return heads * channels; }
  int64_t width() const { return columns * window; }
  int64_t side() const { return 2 * window - 1; }
  int64_t tasks() const { return batch * rows * columns * heads; }
};

// One window and one head of it. Tasks go through all windows of a head first: its bias stays in the cache.
struct Task {
  int64_t head, image, top, left;
  Task(const Attention& a, int64_t index) {
    const int64_t windows = a.rows * a.columns;
    head = index / (a.batch * windows);
    index %= a.batch * windows;
    image = index / windows;
    top = index % windows / a.columns * a.window;
    left = index % a.columns * a.window;
  }
  int64_t pixel(const Attention& a, int64_t key) const {
    return (image * a.rows * a.window + top + key / a.window) * a.width() + left + key % a.window;
  }
};

// Rows of (keys, channels), padded with zeros to whole vectors; (keys / together, channels, together) for several
// keys together.
template <int together, typename T>
void gather(const Attention& a, const Task& task, const T* map, int64_t pixel_stride, T* to) {
  const int64_t padded = a.padded_channels();
  std::memset(to, 0, a.padded_keys() * padded * sizeof(T));
  for (int64_t key = 0; key < a.keys(); ++key) {
    const T* from = map + task.pixel(a, key) * pixel_stride;
    T* row = to + key / together * together * padded + key % together;
    for (int64_t c = 0; c < a.channels; ++c) row[c * together] = from[c];
  }
}

void multiply_by(float factor, float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) numbers[i] *= factor;
}

template <typename T>
void scatter(const Attention& a, const Task& task, const float* from, float scale, T* map, int64_t pixel_stride) {
  for (int64_t key = 0; key < a.keys(); ++key) {
    T* row = map + task.pixel(a, key) * pixel_stride;
    for (int64_t c = 0; c < a.channels; ++c) round_to(row + c, from[key * a.padded_channels() + c] * scale);
  }
}

// Rows of (keys, channels) in the order in which they are multiplied: (keys / 2 vectors, channels / together, 2 vectors,
// together).
template <typename T>
void transpose(const Attention& a, const T* rows, T* to) {
  constexpr int together = Products<T>::kTogether;
  for (int64_t key = 0; key < a.padded_keys(); key += 2 * kLanes)
    for (int64_t c = 0; c < a.channels; c += together)
      for (int64_t lane = 0; lane < 2 * kLanes; ++lane)
        for (int i = 0; i < together; ++i) *to++ = rows[(key + lane) * a.padded_channels() + c + i];
}

// scores[i][key] = starts[i][offset(key)] + sum over c of rows[i][c] * transposed[key][c], for kQueries rows, and the
// largest of each row, lane by lane.
template <typename T, typename Offset>
inline void add_products(const Attention& a, const T* rows, const T* transposed, const float* const* starts,
                         Offset offset, float* scores, Vec* highest) {
  constexpr int together = Products<T>::kTogether;
  const int64_t stride = a.score_stride(), row = a.padded_channels();
  for (int i = 0; i < kQueries; ++i) highest[i] = fill(-kInfinity);
  for (int64_t key = 0; key < a.padded_keys(); key += 2 * kLanes) {
    const int64_t start = offset(key);
    Vec left[kQueries], right[kQueries];
    for (int i = 0; i < kQueries; ++i) {
      left[i] = load(starts[i] + start);
      right[i] = load(starts[i] + start + kLanes);
    }
    for (int64_t c = 0; c < a.channels; c += together) {
      const auto first = load_factors(transposed), second = load_factors(transposed + kLanes * together);
      transposed += 2 * kLanes * together;
      for (int i = 0; i < kQueries; ++i) {
        left[i] = multiply_add(left[i], rows + i * row + c, first);
        right[i] = multiply_add(right[i], rows + i * row + c, second);
      }
    }
    for (int i = 0; i < kQueries; ++i) {
      store(scores + i * stride + key, left[i]);
      store(scores + i * stride + key + kLanes, right[i]);
      highest[i] = vmax(highest[i], vmax(left[i], right[i]));
    }
  }
}

// Where a query's bias begins in its head's table: row by row of the window, side() apart. Queries beyond the last repeat
// it; what they give is not used.
inline const float* bias_of(const Attention& a, const float* table, int64_t query) {
  const int64_t at = std::min(query, a.keys() - 1), y = at / a.window, x = at % a.window;
  return table + (a.window - 1 - y) * a.side() + a.window - 1 - x;
}

// The bias of a query for all keys, one after the other.
inline void lay_out_bias(const Attention& a, const float* bias, float* row) {
  for (int64_t key_row = 0; key_row < a.window; ++key_row)
    std::copy_n(bias + key_row * a.side(), a.window, row + key_row * a.window);
  std::fill(row + a.keys(), row + a.padded_keys(), -kInfinity);
}

// Scores of kQueries queries from `query` on: products of rows and bias. Within its caller GCC is short of registers.
template <typename T>
__attribute__((noinline)) void score(const Attention& a, const float* table, int64_t query, const T* q,
                                     const T* k_transposed, float* scores, Vec* highest) {
  const float* starts[kQueries];
  const T* rows = q + query * a.padded_channels();
  if (a.window % (2 * kLanes) == 0) {
    for (int i = 0; i < kQueries; ++i) starts[i] = bias_of(a, table, query + i);
    const auto offset = [&](int64_t key) { return key / a.window * a.side() + key % a.window; };
    add_products(a, rows, k_transposed, starts, offset, scores, highest);
    return;
  }
  // Where two vectors reach over the end of a window's row, the bias is laid out first.
  for (int i = 0; i < kQueries; ++i) {
    float* row = scores + i * a.score_stride();
    lay_out_bias(a, bias_of(a, table, query + i), row);
    starts[i] = row;
  }
  add_products(a, rows, k_transposed, starts, [](int64_t key) { return key; }, scores, highest);
}

// to[i] = sum over keys of weights[i][key] * rows[key], for kQueries rows i; V vectors of (channels), kTogether keys
// together.
template <typename T, int V>
void weigh_rows(const Attention& a, const T* weights, const T* rows, float* to) {
  constexpr int together = Products<T>::kTogether;
  const int64_t stride = a.score_stride() * sizeof(float) / sizeof(T);
  Vec even[kQueries][V] = {}, odd[kQueries][V] = {};
  for (int64_t key = 0; key < a.padded_keys(); key += 2 * together) {
    for (int v = 0; v < V; ++v) {
      const T* at = rows + (key * V + v * together) * kLanes;
      const auto first = load_factors(at), second = load_factors(at + together * V * kLanes);
      for (int i = 0; i < kQueries; ++i) {
        even[i][v] = multiply_add(even[i][v], weights + i * stride + key, first);
        odd[i][v] = multiply_add(odd[i][v], weights + i * stride + key + together, second);
      }
    }
  }
  for (int i = 0; i < kQueries; ++i)
    for (int v = 0; v < V; ++v) store(to + (i * V + v) * kLanes, even[i][v] + odd[i][v]);
}

// to[key] += sum over i of weights[i][key] * rows[i], for kQueries rows i; kTogether of them together, as
// (kQueries / together, keys, together) and (kQueries / together, channels, together).
template <typename T, int V>
void add_weighted(const Attention& a, const T* weights, const T* rows, float* to) {
  constexpr int together = Products<T>::kTogether, count = kQueries / together;
  const int64_t stride = a.score_stride() * together;
  for (int v = 0; v < V; ++v) {
    typename Products<T>::Factors row[count];
    for (int i = 0; i < count; ++i) row[i] = load_factors(rows + (i * V + v) * kLanes * together);
    for (int64_t key = 0; key < a.keys(); ++key) {
      float* at = to + (key * V + v) * kLanes;
      Vec total = load(at);
      for (int i = 0; i < count; ++i) total = multiply_add(total, weights + i * stride + key * together, row[i]);
      store(at, total);
    }
  }
}

template <typename T>
using WeighRows = void (*)(const Attention&, const T*, const T*, float*);

// Both functions for as many vectors as a head's channels fill.
template <typename T>
WeighRows<T> weigh_rows_of(const Attention& a) {
  constexpr WeighRows<T> forms[] = {weigh_rows<T, 1>, weigh_rows<T, 2>, weigh_rows<T, 3>, weigh_rows<T, 4>};
  return forms[a.padded_channels() / kLanes - 1];
}

template <typename T>
WeighRows<T> add_weighted_of(const Attention& a) {
  constexpr WeighRows<T> forms[] = {add_weighted<T, 1>, add_weighted<T, 2>, add_weighted<T, 3>, add_weighted<T, 4>};
  return forms[a.padded_channels() / kLanes - 1];
}

std::unique_ptr<float[]> scaled_table(const Attention& a, const float* table, float scale) {
  const int64_t entries = a.side() * a.side(), all = a.heads * entries;
  std::unique_ptr<float[]> scaled(new float[all]);
  for (int64_t i = 0; i < all; ++i) scaled[i] = table[i] * scale;
  return scaled;
}

// Scores, which times `unit` are in units of log2, become their exponentials in their place: 2^((score - most) unit), as
// factors. Returns `before` and the sums of them, lane by lane.
template <typename T>
inline Vec exponentials(float* scores, int64_t count, float most, float unit, Vec before) {
  T* weights = reinterpret_cast<T*>(scores);
  Vec even = before, odd = {};
  for (int64_t key = 0; key < count; key += 2 * kLanes) {
    const Vec first = exp2_of<T>((load(scores + key) - most) * unit);
    const Vec second = exp2_of<T>((load(scores + key + kLanes) - most) * unit);
    store_factors(weights + key, first);
    store_factors(weights + key + kLanes, second);
    even += first;
    odd += second;
  }
  return even + odd;
}

// See esc_window_attention. T: of qkv, out and the factors.
template <typename T>
void attend(const Attention& a, const T* qkv, const float* table, T* out, float* log_sums, int threads) {
  constexpr int together = Products<T>::kTogether;
  const int64_t keys = a.keys(), padded_keys = a.padded_keys(), padded = a.padded_channels(), dim = a.dim();
  const int64_t channels = a.channels;
  // Scores are kept in units of log2, so that exponentials are powers of 2. In bfloat16 queries are not scaled, which
  // would round them again, and the scores are in units of their own until the exponentials.
  const float in_log2 = kLog2E / std::sqrt(static_cast<float>(channels));
  const float unit = together == 1 ? 1 : in_log2;
  const auto scaled = scaled_table(a, table, kLog2E / unit);
  const WeighRows<T> weigh = weigh_rows_of<T>(a);
  const int64_t square = padded_keys * padded, score_block = kQueries * a.score_stride();
  const int64_t all_transposed = padded_keys * round_up(channels, together);
  std::vector<Scratch> scratches = scratch_for(threads, 3 * square + all_transposed + score_block + 8 * kLanes);
#pragma omp parallel num_threads(threads)
  {
    Scratch& scratch = scratches[omp_get_thread_num()];
    T* q = scratch.take_as<T>(square);
    T* k = scratch.take_as<T>(square);
    T* v = scratch.take_as<T>(square);
    T* k_transposed = scratch.take_as<T>(all_transposed);
    float* scores = scratch.take(score_block);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < a.tasks(); ++index) {
      const Task task(a, index);
      const T* from = qkv + task.head * channels;
      gather<1>(a, task, from, 3 * dim, q);
      gather<1>(a, task, from + dim, 3 * dim, k);
      gather<together>(a, task, from + 2 * dim, 3 * dim, v);
      if constexpr (together == 1) multiply_by(in_log2, q, square);
      transpose(a, k, k_transposed);
      for (int64_t query = 0; query < keys; query += kQueries) {
        Vec highest[kQueries];
        score(a, scaled.get() + task.head * a.side() * a.side(), query, q, k_transposed, scores, highest);
        float sums[kQueries];
        for (int i = 0; i < kQueries; ++i) {
          float* row = scores + i * a.score_stride();
          const float most = largest(highest[i]);
          sums[i] = sum(exponentials<T>(row, padded_keys, most, unit, Vec{}));
          if (log_sums != nullptr && query + i < keys) log_sums[index * keys + query + i] = most * unit + std::log2(sums[i]);
        }
        float weighed[kQueries * 4 * kLanes];
        weigh(a, reinterpret_cast<const T*>(scores), v, weighed);
        for (int i = 0; i < kQueries && query + i < keys; ++i) {
          T* to = out + task.pixel(a, query + i) * dim + task.head * channels;
          for (int64_t c = 0; c < channels; ++c) round_to(to + c, weighed[i * padded + c] / sums[i]);
        }
      }
    }
  }
}

#if defined(ESC_TILES)
// A softmax of kBlock rows of scores that come in parts: what was summed of earlier parts is made smaller where a later
// one has a larger score.
struct SoftmaxByParts {
  float highest[kBlock];
  Vec sums[kBlock] = {};

  SoftmaxByParts() { std::fill(highest, highest + kBlock, -kInfinity); }

  // The next `count` scores of row i, which times `unit` are in units of log2, become weights in their place. Returns
  // the factor by which all earlier weights are made smaller.
  Vec weights_of(int i, float* scores, int64_t count, float unit) {
    Vec even = fill(highest[i]), odd = even;
    for (int64_t key = 0; key < count; key += 2 * kLanes) {
      even = vmax(even, load(scores + key));
      odd = vmax(odd, load(scores + key + kLanes));
    }
    const float most = _mm512_reduce_max_ps(vmax(even, odd));
    const Vec factor = exp2_negative(fill((highest[i] - most) * unit));
    highest[i] = most;
    sums[i] = exponentials<Bf16>(scores, count, most, unit, sums[i] * factor);
    return factor;
  }
};

// As attend in bfloat16, by tiles, for kBlock queries at a time. Keys come in parts whose scores the first cache holds.
void attend_by_tiles(const Attention& a, const Bf16* qkv, const float* table, Bf16* out, float* log_sums, int threads) {
  const int64_t keys = a.keys(), padded_keys = a.padded_keys(), padded = a.padded_channels(), dim = a.dim();
  const int64_t channels = a.channels, depth = round_up(channels, kTileDepth);
  const float unit = kLog2E / std::sqrt(static_cast<float>(channels));
  const auto scaled = scaled_table(a, table, kLog2E / unit);
  // Where a block's keys are of one row of the window, and its queries, too, sums start in the table.
  const bool starts_in_table = a.window % kBlock == 0;
  const int64_t part = starts_in_table ? std::min<int64_t>(padded_keys, 256) : padded_keys;
  const int64_t stride = part + kLanes;
  std::vector<Scratch> scratches =
      scratch_for(threads, padded_keys * (2 * depth + padded) + kBlock * (stride + padded) + 8 * kLanes);
#pragma omp parallel num_threads(threads)
  {
    const AmxTiles tiles;
    Scratch& scratch = scratches[omp_get_thread_num()];
    Bf16* q = scratch.take_as<Bf16>(padded_keys * depth);   // (keys, channels)
    Bf16* k = scratch.take_as<Bf16>(padded_keys * depth);   // a second factor (channels, keys)
    Bf16* v = scratch.take_as<Bf16>(padded_keys * padded);  // a second factor (keys, channels)
    float* scores = scratch.take(kBlock * stride);
    float* weighed = scratch.take(kBlock * padded);
    std::fill(q, q + padded_keys * depth, Bf16{0});  // what pads them stays so
    std::fill(k, k + padded_keys * depth, Bf16{0});
    std::fill(v, v + padded_keys * padded, Bf16{0});
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < a.tasks(); ++index) {
      const Task task(a, index);
      for (int64_t key = 0; key < keys; ++key) {
        const Bf16* from = qkv + task.pixel(a, key) * 3 * dim + task.head * channels;
        for (int64_t c = 0; c < channels; ++c) {
          q[key * depth + c] = from[c];
          k[AmxTiles::at(c, key, depth, padded_keys)] = from[dim + c];
          v[AmxTiles::at(key, c, padded_keys, padded)] = from[2 * dim + c];
        }
      }
      const float* head_table = scaled.get() + task.head * a.side() * a.side();
      for (int64_t query = 0; query < keys; query += kBlock) {
        const float* bias = bias_of(a, head_table, query);
        if (!starts_in_table)
          for (int i = 0; i < kBlock; ++i) lay_out_bias(a, bias_of(a, head_table, query + i), scores + i * stride);
        SoftmaxByParts softmax;
        std::fill(weighed, weighed + kBlock * padded, 0.0f);
        for (int64_t first = 0; first < padded_keys; first += part) {
          const int64_t count = std::min(part, padded_keys - first);
          for (int64_t key = first; key < first + count; key += kBlock) {
            float* block = scores + key - first;
            // The next query of a row is one to the right, its bias for a key one to the left.
            const float* start = starts_in_table ? bias + key / a.window * a.side() + key % a.window : block;
            multiply_tiles(q + query * depth, depth, k + key * depth, depth * kTile, depth, false, start,
                           starts_in_table ? -1 : stride, block, stride);
          }
          for (int i = 0; i < kBlock; ++i) {
            const Vec factor = softmax.weights_of(i, scores + i * stride, count, unit);
            float* row = weighed + i * padded;
            for (int64_t c = 0; c < padded; c += kLanes) store(row + c, load(row + c) * factor);
          }
          const Bf16* weights = reinterpret_cast<const Bf16*>(scores);
          for (int64_t c = 0; c < padded; c += kBlock)
            multiply_tiles(weights, 2 * stride, v + c * padded_keys + first * kTile, padded_keys * kTile, count,
                           c + kTile == padded, weighed + c, padded, weighed + c, padded);
        }
        for (int i = 0; i < kBlock && query + i < keys; ++i) {
          Bf16* to = out + task.pixel(a, query + i) * dim + task.head * channels;
          const float total = sum(softmax.sums[i]);
          if (log_sums != nullptr)
            log_sums[index * keys + query + i] = softmax.highest[i] * unit + std::log2(total);
          for (int64_t c = 0; c < channels; ++c) round_to(to + c, weighed[i * padded + c] / total);
        }
      }
    }
  }
}
#endif

}  // namespace

// qkv: (batch, rows * window, columns * window, 3 * heads * channels), ordered (q k v, head, channel).
// table: (heads, (2 window - 1)^2). out: as qkv, with heads * channels.
// log_sums: (batch * rows * columns * heads, window^2) in units of log2, for the gradients; may be null.
// bf16: whether qkv and out are bfloat16, not float; if esc_has_bf16(). channels <= 4 * lanes().
extern "C" int esc_window_attention(const void* qkv, void* out, const float* table, float* log_sums, int bf16,
                                     int64_t batch, int64_t rows, int64_t columns, int64_t window, int64_t heads,
                                     int64_t channels, int threads) try {
  const Attention a{batch, rows, columns, window, heads, channels};
#if defined(ESC_TILES)
  if (bf16 && may_use_tiles()) {
    attend_by_tiles(a, static_cast<const Bf16*>(qkv), table, static_cast<Bf16*>(out), log_sums, threads);
    return 0;
  }
#endif
#if defined(ESC_BF16)
  if (bf16) {
    attend(a, static_cast<const Bf16*>(qkv), table, static_cast<Bf16*>(out), log_sums, threads);
    return 0;
  }
#endif
  attend(a, static_cast<const float*>(qkv), table, static_cast<float*>(out), log_sums, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// ---------------------------------------------------------------------------- gradients of window attention

namespace {

#if defined(ESC_BF16)
// A key's numbers of queries that are multiplied together, side by side: (keys, together) of Vecs by query.
inline void store_together(Bf16* to, const Vec* of_query) {
  interleave((__m256i)_mm512_cvtneps_pbh(of_query[0]), (__m256i)_mm512_cvtneps_pbh(of_query[1]), to);
}
#endif

// See esc_window_attention_backward. T: of the maps and the factors.
template <typename T>
void attend_backward(const Attention& a, const T* qkv, const float* table, const float* log_sums, const T* out_grad,
                     T* qkv_grad, float* table_grad, int threads) {
  constexpr int together = Products<T>::kTogether;
  const int64_t keys = a.keys(), padded_keys = a.padded_keys(), padded = a.padded_channels(), dim = a.dim();
  const int64_t entries = a.side() * a.side(), window = a.window, heads = a.heads, channels = a.channels;
  const float root = 1 / std::sqrt(static_cast<float>(channels));
  // As in `attend`: q carries log2(e) / sqrt(channels) in float32, and nothing in bfloat16.
  const float carried = together == 1 ? root * kLog2E : 1, unit = root * kLog2E / carried;
  const auto scaled = scaled_table(a, table, kLog2E / unit);
  const WeighRows<T> weigh = weigh_rows_of<T>(a), add = add_weighted_of<T>(a);
  const int64_t square = padded_keys * padded, score_block = kQueries * a.score_stride();
  const int64_t all_transposed = padded_keys * round_up(channels, together);
  const int64_t copies = together == 1 ? 0 : 2;
  std::vector<Scratch> scratches = scratch_for(
      threads, (8 + copies) * square + 2 * all_transposed + (2 + copies) * score_block + entries + 24 * kLanes);
#pragma omp parallel num_threads(threads)
  {
    Scratch& scratch = scratches[omp_get_thread_num()];
    T* q = scratch.take_as<T>(square);
    T* k = scratch.take_as<T>(square);
    T* v = scratch.take_as<T>(square);
    T* upstream = scratch.take_as<T>(square);
    T* k_transposed = scratch.take_as<T>(all_transposed);
    T* v_transposed = scratch.take_as<T>(all_transposed);
    // Rows of several queries or keys together, to be summed over them; in float32 of one, q without its factor.
    T* q_together = scratch.take_as<T>(square);
    T* k_together = together == 1 ? k : scratch.take_as<T>(square);
    T* upstream_together = together == 1 ? upstream : scratch.take_as<T>(square);
    float* q_grad = scratch.take(square);
    float* k_grad = scratch.take(square);
    float* v_grad = scratch.take(square);
    float* scores = scratch.take(score_block);
    float* products = scratch.take(score_block);
    T* weights_together = together == 1 ? reinterpret_cast<T*>(scores) : scratch.take_as<T>(score_block);
    T* products_together = together == 1 ? reinterpret_cast<T*>(products) : scratch.take_as<T>(score_block);
    // For the sum over keys; in bfloat16 in the scores' place.
    T* products_by_query = reinterpret_cast<T*>(together == 1 ? products : scores);
    float* bias_grad = scratch.take(entries);
    float* zeros = scratch.take(2 * kLanes);
    std::fill(zeros, zeros + 2 * kLanes, 0.0f);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < a.tasks(); ++index) {
      const Task task(a, index);
      const T* from = qkv + task.head * channels;
      gather<1>(a, task, from, 3 * dim, q);
      gather<1>(a, task, from + dim, 3 * dim, k);
      gather<1>(a, task, from + 2 * dim, 3 * dim, v);
      gather<1>(a, task, out_grad + task.head * channels, dim, upstream);
      if constexpr (together == 1) multiply_by(carried, q, square);
      gather<together>(a, task, from, 3 * dim, q_together);
      if constexpr (together > 1) {
        gather<together>(a, task, from + dim, 3 * dim, k_together);
        gather<together>(a, task, out_grad + task.head * channels, dim, upstream_together);
      }
      transpose(a, k, k_transposed);
      transpose(a, v, v_transposed);
      std::fill(k_grad, k_grad + square, 0.0f);
      std::fill(v_grad, v_grad + square, 0.0f);
      std::fill(bias_grad, bias_grad + entries, 0.0f);
      for (int64_t query = 0; query < keys; query += kQueries) {
        Vec highest[kQueries];
        score(a, scaled.get() + task.head * entries, query, q, k_transposed, scores, highest);
        const float* starts[kQueries];
        std::fill(starts, starts + kQueries, zeros);
        const auto none = [](int64_t) { return 0; };
        add_products(a, upstream + query * padded, v_transposed, starts, none, products, highest);
        // The weights in the scores' place, and what the products are on average.
        float expected[kQueries];
        for (int i = 0; i < kQueries; ++i) {
          float* score_row = scores + i * a.score_stride();
          const float* product_row = products + i * a.score_stride();
          const float log_sum = query + i < keys ? log_sums[index * keys + query + i] : kInfinity;
          Vec even = {}, odd = {};
          for (int64_t key = 0; key < padded_keys; key += 2 * kLanes) {
            const Vec left = exp2_of<T>(load(score_row + key) * unit - log_sum);
            const Vec right = exp2_of<T>(load(score_row + key + kLanes) * unit - log_sum);
            store(score_row + key, left);
            store(score_row + key + kLanes, right);
            even += left * load(product_row + key);
            odd += right * load(product_row + key + kLanes);
          }
          expected[i] = sum(even + odd);
        }
        for (int first = 0; first < kQueries; first += together) {
          for (int64_t key = 0; key < padded_keys; key += kLanes) {
            Vec weight[together], product[together];
            for (int j = 0; j < together; ++j) {
              const int i = first + j;
              float* score_row = scores + i * a.score_stride();
              float* product_row = products + i * a.score_stride();
              weight[j] = load(score_row + key);
              product[j] = weight[j] * (load(product_row + key) - expected[i]);
              store(product_row + key, product[j]);
              if constexpr (together > 1) store_factors(reinterpret_cast<T*>(score_row) + key, product[j]);
            }
            if constexpr (together > 1) {
              store_together(weights_together + (first * a.score_stride() + key * together), weight);
              store_together(products_together + (first * a.score_stride() + key * together), product);
            }
          }
        }
        for (int i = 0; i < kQueries && query + i < keys; ++i) {
          const int64_t at = query + i, y = at / window, x = at % window;
          for (int64_t key_row = 0; key_row < window; ++key_row) {
            float* to = bias_grad + (key_row - y + window - 1) * a.side() + window - 1 - x;
            const float* add_from = products + i * a.score_stride() + key_row * window;
            for (int64_t c = 0; c < window; ++c) to[c] += add_from[c];
          }
        }
        weigh(a, products_by_query, k_together, q_grad + query * padded);
        add(a, products_together, q_together + query * padded, k_grad);
        add(a, weights_together, upstream_together + query * padded, v_grad);
      }
      T* to = qkv_grad + task.head * channels;
      scatter(a, task, q_grad, root, to, 3 * dim);
      scatter(a, task, k_grad, root, to + dim, 3 * dim);
      scatter(a, task, v_grad, 1, to + 2 * dim, 3 * dim);
      const int64_t of_window = index % (a.batch * a.rows * a.columns);
      std::memcpy(table_grad + (of_window * heads + task.head) * entries, bias_grad, entries * sizeof(float));
    }
  }
}

}  // namespace

// The gradients of esc_window_attention: out_grad, qkv_grad and table_grad are laid out as out, qkv and table.
// table_grad is of each image and window, (batch * rows * columns, heads, (2 window - 1)^2), to be summed.
// bf16: whether the maps are bfloat16, not float; if esc_has_bf16().
extern "C" int esc_window_attention_backward(const void* qkv, const void* out_grad, void* qkv_grad,
                                              const float* table, const float* log_sums, float* table_grad, int bf16,
                                              int64_t batch, int64_t rows, int64_t columns, int64_t window, int64_t heads,
                                              int64_t channels, int threads) try {
  const Attention a{batch, rows, columns, window, heads, channels};
#if defined(ESC_BF16)
  if (bf16) {
    attend_backward(a, static_cast<const Bf16*>(qkv), table, log_sums, static_cast<const Bf16*>(out_grad),
                    static_cast<Bf16*>(qkv_grad), table_grad, threads);
    return 0;
  }
#endif
  attend_backward(a, static_cast<const float*>(qkv), table, log_sums, static_cast<const float*>(out_grad),
                  static_cast<float*>(qkv_grad), table_grad, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// ------------------------------------------------------------------------------------------------- ConvFFN

namespace {

// A second factor as vectors want it: (depth / together, columns, together).
template <int together>
struct Vectors {
  static constexpr int kDepth = kLanes;
  static int64_t at(int64_t d, int64_t column, int64_t, int64_t columns) {
    return d / together * together * columns + column * together + d % together;
  }
};

// A matrix (outputs, inputs) in the order in which it is multiplied, padded to whole vectors, and its bias, zero where it
// is null. What it is multiplied by has rows of `depth` numbers, padded with zeros.
template <typename T, typename L = Vectors<Products<T>::kTogether>>
struct Packed {
  typedef T Number;
  typedef L Layout;
  int64_t inputs, outputs, padded, depth;
  std::unique_ptr<T[]> weight_memory;
  std::unique_ptr<float[]> bias_memory;

  Packed(const float* weight, const float* bias, int64_t outputs, int64_t inputs)
      : inputs(inputs),
        outputs(outputs),
        padded(round_up(outputs, kLanes)),
        depth(round_up(inputs, Layout::kDepth)),
        weight_memory(new T[depth * padded]()),
        bias_memory(new float[padded]()) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t i = 0; i < inputs; ++i)
        round_to(&weight_memory[Layout::at(i, o, depth, padded)], weight[o * inputs + i]);
      if (bias != nullptr) bias_memory[o] = bias[o];
    }
  }
  const T* weight() const { return weight_memory.get(); }
  const float* bias() const { return bias_memory.get(); }
};

template <typename T, int P, int V, bool Gelu>
inline void multiply_block(const Packed<T>& by, const T* rows, int64_t stride, float* to, int64_t first) {
  constexpr int together = Products<T>::kTogether;
  Vec total[P][V];
  for (int v = 0; v < V; ++v)
    for (int i = 0; i < P; ++i) total[i][v] = load(by.bias() + first + v * kLanes);
  for (int64_t k = 0; k < by.inputs; k += together) {
    typename Products<T>::Factors weight[V];
    for (int v = 0; v < V; ++v)
      weight[v] = load_factors(by.weight() + k * by.padded + (first + v * kLanes) * together);
    for (int i = 0; i < P; ++i)
      for (int v = 0; v < V; ++v) total[i][v] = multiply_add(total[i][v], rows + i * stride + k, weight[v]);
  }
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v)
      store(to + i * by.padded + first + v * kLanes, Gelu ? gelu(total[i][v]) : total[i][v]);
}

template <int V, bool Gelu, typename T>
void multiply_columns(const Packed<T>& by, const T* rows, int64_t count, int64_t stride, float* to, int64_t first) {
  int64_t row = 0;
  for (; row + kPixels <= count; row += kPixels)
    multiply_block<T, kPixels, V, Gelu>(by, rows + row * stride, stride, to + row * by.padded, first);
  for (; row < count; ++row)
    multiply_block<T, 1, V, Gelu>(by, rows + row * stride, stride, to + row * by.padded, first);
}

// to (count, padded outputs) = rows (count, inputs) times the matrix, plus the bias; then GELU if asked for.
// Where inputs are multiplied together, rows are padded with zeros.
template <bool Gelu, typename T>
void multiply(const Packed<T>& by, const T* rows, int64_t count, int64_t stride, float* to) {
  for (int64_t first = 0; first < by.padded;) {
    const int64_t vectors = (by.padded - first) / kLanes;
    // five vectors are better three and two than four and one
    const int64_t taken = vectors == 5 ? 3 : std::min<int64_t>(vectors, 4);
    if (taken == 4) multiply_columns<4, Gelu>(by, rows, count, stride, to, first);
    if (taken == 3) multiply_columns<3, Gelu>(by, rows, count, stride, to, first);
    if (taken == 2) multiply_columns<2, Gelu>(by, rows, count, stride, to, first);
    if (taken == 1) multiply_columns<1, Gelu>(by, rows, count, stride, to, first);
    first += taken * kLanes;
  }
}

#if defined(ESC_TILES)
// The same by tiles, which read rows up to a multiple of kBlock.
template <bool Gelu>
void multiply(const Packed<Bf16, AmxTiles>& by, const Bf16* rows, int64_t count, int64_t stride, float* to) {
  alignas(sizeof(Vec)) float block[kBlock * kBlock];
  for (int64_t row = 0; row < count; row += kBlock) {
    const int64_t block_rows = std::min<int64_t>(kBlock, count - row);
    for (int64_t first = 0; first < by.padded; first += kBlock) {
      const int64_t columns = std::min<int64_t>(kBlock, by.padded - first);
      // All rows of sums start as the bias.
      multiply_tiles(rows + row * stride, stride, by.weight() + first * by.depth, by.depth * kTile, by.depth,
                     columns == kTile, by.bias() + first, 0, block, kBlock);
      for (int64_t i = 0; i < block_rows; ++i) {
        for (int64_t v = 0; v < columns; v += kLanes) {
          const Vec total = load(block + i * kBlock + v);
          store(to + (row + i) * by.padded + first + v, Gelu ? gelu(total) : total);
        }
      }
    }
  }
}
#endif

// A 3×3 convolution of `padded` numbers a pixel, of kLanes of them at one pixel: `at` is that pixel's left neighbour in
// lines that have a pixel of zeros at both ends.
inline Vec nine_taps(const Vec tap[9], const float* const lines[3], int64_t at, int64_t padded) {
  Vec line_total[3];
  for (int y = 0; y < 3; ++y) {
    const float* from = lines[y] + at;
    line_total[y] = tap[3 * y] * load(from) + tap[3 * y + 1] * load(from + padded) +
                    tap[3 * y + 2] * load(from + 2 * padded);
  }
  return line_total[0] + (line_total[1] + line_total[2]);
}

// to = hidden + GELU(depthwise 3×3 of hidden) for one line, `stride` numbers a pixel; the three lines have a pixel of
// zeros at both ends.
template <typename T>
void depthwise_line(const Packed<float>& taps, const float* const lines[3], int64_t width, T* to, int64_t stride) {
  const int64_t padded = taps.padded;
  for (int64_t first = 0; first < padded; first += kLanes) {
    Vec tap[9];
    for (int t = 0; t < 9; ++t) tap[t] = load(taps.weight() + t * padded + first);
    const Vec bias = load(taps.bias() + first);
    for (int64_t x = 0; x < width; ++x) {
      const Vec total = bias + nine_taps(tap, lines, x * padded + first, padded);
      store_factors(to + x * stride + first, load(lines[1] + (x + 1) * padded + first) + gelu(total));
    }
  }
}

// A LayerNorm over channels of a line of pixels, eps 1e-6, unless weight is null; to: `stride` numbers a pixel.
template <typename T>
void normalise_line(const float* weight, const float* bias, int64_t channels, int64_t width, const float* line, T* to,
                    int64_t stride) {
  for (int64_t x = 0; x < width; ++x, line += channels, to += stride) {
    if (weight == nullptr) {
      for (int64_t c = 0; c < channels; ++c) round_to(to + c, line[c]);
      continue;
    }
    float mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c) mean += line[c];
    mean /= channels;
    for (int64_t c = 0; c < channels; ++c) variance += (line[c] - mean) * (line[c] - mean);
    const float factor = 1 / std::sqrt(variance / channels + 1e-6f);
    for (int64_t c = 0; c < channels; ++c) round_to(to + c, (line[c] - mean) * factor * weight[c] + bias[c]);
  }
}

// See esc_conv_ffn. Matrix: of the 1×1 convolutions.
template <typename Matrix>
void conv_ffn(const float* x, const float* norm_weight, const float* norm_bias, const float* proj_weight,
              const float* proj_bias, const float* dwc_weight, const float* dwc_bias,
              const float* last_weight, const float* last_bias, float* first, float* out, int add,
              int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
              int64_t split, int threads) {
  typedef typename Matrix::Number T;
  const Matrix proj(proj_weight, proj_bias, hidden, channels);
  const Packed<float> dwc(dwc_weight, dwc_bias, hidden, 9);
  const Matrix last(last_weight, last_bias, split + channels, hidden);
  const int64_t rows = round_up(width, 2 * kLanes);  // tiles have so many
  // Bands of lines: enough of them to share evenly, high enough for the line done twice at each end to cost little.
  const int64_t band = std::max<int64_t>(16, (height * batch + 4 * threads - 1) / (4 * threads));
  const int64_t bands = (height + band - 1) / band;
  const int64_t line_size = (width + 2) * proj.padded;
  // What lies above and below each band, as it is before any band is written: out may be x.
  const int64_t x_line = width * channels;
  const std::unique_ptr<float[]> borders(new float[batch * bands * 2 * x_line]);
  for (int64_t index = 0; index < batch * bands; ++index) {
    const int64_t image = index / bands, top = index % bands * band, bottom = std::min(top + band, height);
    const float* from = x + image * height * x_line;
    if (top > 0) std::copy_n(from + (top - 1) * x_line, x_line, borders.get() + 2 * index * x_line);
    if (bottom < height) std::copy_n(from + bottom * x_line, x_line, borders.get() + (2 * index + 1) * x_line);
  }
  const int64_t factors = rows * (proj.depth + last.depth);
  std::vector<Scratch> scratches = scratch_for(threads, 4 * line_size + factors + width * last.padded + 8 * kLanes);
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename Matrix::Layout layout{};  // which shapes tiles
    Scratch& scratch = scratches[omp_get_thread_num()];
    float* ring[3] = {scratch.take(line_size), scratch.take(line_size), scratch.take(line_size)};
    float* none = scratch.take(line_size);
    T* mixed = scratch.take_as<T>(rows * last.depth);
    T* normalised = scratch.take_as<T>(rows * proj.depth);
    float* results = scratch.take(width * last.padded);
    for (float* line : {ring[0], ring[1], ring[2], none}) std::fill(line, line + line_size, 0.0f);
    std::memset(mixed, 0, rows * last.depth * sizeof(T));
    std::memset(normalised, 0, rows * proj.depth * sizeof(T));
    const auto expand = [&](const float* line, int64_t y) {
      normalise_line(norm_weight, norm_bias, channels, width, line, normalised, proj.depth);
      multiply<true>(proj, normalised, width, proj.depth, ring[y % 3] + proj.padded);
    };
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < batch * bands; ++index) {
      const int64_t image = index / bands, top = index % bands * band, bottom = std::min(top + band, height);
      const float* lines_of_image = x + image * height * x_line;
      const float* above = borders.get() + 2 * index * x_line;
      if (top > 0) expand(above, top - 1);
      expand(lines_of_image + top * x_line, top);
      for (int64_t y = top; y < bottom; ++y) {
        if (y + 1 < bottom) expand(lines_of_image + (y + 1) * x_line, y + 1);
        if (y + 1 == bottom && bottom < height) expand(above + x_line, bottom);
        const float* const lines[3] = {y > 0 ? ring[(y - 1) % 3] : none, ring[y % 3],
                                       y + 1 < height ? ring[(y + 1) % 3] : none};
        depthwise_line(dwc, lines, width, mixed, last.depth);
        multiply<false>(last, mixed, width, last.depth, results);
        const int64_t at = (image * height + y) * width;
        for (int64_t column = 0; column < width; ++column) {
          const float* result = results + column * last.padded;
          const float* skip = x + (at + column) * channels;
          float* to = out + (at + column) * channels;
          for (int64_t c = 0; c < split; ++c) first[(at + column) * split + c] = result[c];
          for (int64_t c = 0; c < channels; ++c) to[c] = result[split + c] + (add ? skip[c] : 0.0f);
        }
      }
    }
  }
}

}  // namespace

// A ConvFFN and what follows it without a nonlinearity between: hidden = GELU(proj x), + GELU(dwc hidden); then a 1×1
// convolution to split + channels channels, of which the first go to `first`, the others to `out`.
// x, out: (batch, height, width, channels), first: (batch, height, width, split); out may be x.
// norm_weight, norm_bias: a LayerNorm before proj, eps 1e-6, or null. add: whether x is added to out.
// bf16: whether 1×1 convolutions multiply in bfloat16; if esc_has_bf16().
// proj: (hidden, channels), dwc: (hidden, 9), last: (split + channels, hidden), each with its bias.
extern "C" int esc_conv_ffn(const float* x, const float* norm_weight, const float* norm_bias, const float* proj_weight,
                             const float* proj_bias, const float* dwc_weight, const float* dwc_bias,
                             const float* last_weight, const float* last_bias, float* first, float* out, int add, int bf16,
                             int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                             int64_t split, int threads) try {
  auto run = conv_ffn<Packed<float>>;
#if defined(ESC_BF16)
  if (bf16) run = conv_ffn<Packed<Bf16>>;
#endif
#if defined(ESC_TILES)
  if (bf16 && may_use_tiles()) run = conv_ffn<Packed<Bf16, AmxTiles>>;
#endif
  run(x, norm_weight, norm_bias, proj_weight, proj_bias, dwc_weight, dwc_bias, last_weight, last_bias, first, out, add,
      batch, height, width, channels, hidden, split, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// ------------------------------------------------------------------------------------- gradients of the ConvFFN

namespace {

// GELU and its derivative, the latter with an error of 1e-6.
struct GeluAndSlope {
  Vec value, slope;
  explicit GeluAndSlope(Vec x) {
    const Vec cdf = normal_cdf(x);
    value = x * cdf;
    slope = cdf + x * exp2_negative(x * x * (-0.5f * kLog2E)) * 0.3989422804014327f;
  }
};

// Rows (count, channels) as rows of T padded with zeros to (count, padded).
template <typename T>
void round_rows(const float* rows, int64_t count, int64_t channels, int64_t padded, T* to) {
  const int64_t whole = channels / kLanes * kLanes;
  for (int64_t row = 0; row < count; ++row, rows += channels, to += padded) {
    for (int64_t c = 0; c < whole; c += kLanes) store_factors(to + c, load(rows + c));
    for (int64_t c = whole; c < padded; ++c) round_to(to + c, c < channels ? rows[c] : 0.0f);
  }
}

// Rows (count, width) as factors that are summed over rows, (count / together, width, together): themselves, or in `to`.
// width: whole vectors.
inline const float* summed_over_rows(const float* rows, int64_t, int64_t, float*) { return rows; }

#if defined(ESC_BF16)
const Bf16* summed_over_rows(const Bf16* rows, int64_t count, int64_t width, Bf16* to) {
  for (int64_t row = 0; row < count; row += 2)
    for (int64_t c = 0; c < width; c += kLanes) {
      __m256i pair[2] = {};  // there may be no second row of the last two
      for (int i = 0; i < 2 && row + i < count; ++i) std::memcpy(pair + i, rows + (row + i) * width + c, sizeof(__m256i));
      interleave(pair[0], pair[1], to + row * width + 2 * c);
    }
  return to;
}
#endif

template <typename T, int P, int V>
inline void add_outer_block(const T* a, int64_t a_width, const T* b, int64_t b_width, int64_t count, float* to) {
  constexpr int together = Products<T>::kTogether;
  Vec total[P][V];
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v) total[i][v] = load(to + i * b_width + v * kLanes);
  for (int64_t row = 0; row < count; row += together, a += a_width * together, b += b_width * together) {
    typename Products<T>::Factors factors[V];
    for (int v = 0; v < V; ++v) factors[v] = load_factors(b + v * kLanes * together);
    for (int i = 0; i < P; ++i)
      for (int v = 0; v < V; ++v) total[i][v] = multiply_add(total[i][v], a + i * together, factors[v]);
  }
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v) store(to + i * b_width + v * kLanes, total[i][v]);
}

template <int V, typename T>
void add_outer_columns(const T* a, int64_t outputs, int64_t a_width, const T* b, int64_t b_width, int64_t count,
                       float* to) {
  constexpr int together = Products<T>::kTogether;
  int64_t o = 0;
  for (; o + kPixels <= outputs; o += kPixels)
    add_outer_block<T, kPixels, V>(a + o * together, a_width, b, b_width, count, to + o * b_width);
  for (; o < outputs; ++o) add_outer_block<T, 1, V>(a + o * together, a_width, b, b_width, count, to + o * b_width);
}

// to (outputs, b_width) += the sum over rows of a (count, a_width), of which `outputs` count, times b (count, b_width);
// both as summed_over_rows lays them out.
template <typename T>
void add_outer(const T* a, int64_t outputs, int64_t a_width, const T* b, int64_t b_width, int64_t count, float* to) {
  constexpr int together = Products<T>::kTogether;
  for (int64_t first = 0; first < b_width;) {
    const int64_t vectors = (b_width - first) / kLanes;
    const int64_t taken = vectors == 5 ? 3 : std::min<int64_t>(vectors, 4);  // as in `multiply`
    const T* columns = b + first * together;
    if (taken == 4) add_outer_columns<4>(a, outputs, a_width, columns, b_width, count, to + first);
    if (taken == 3) add_outer_columns<3>(a, outputs, a_width, columns, b_width, count, to + first);
    if (taken == 2) add_outer_columns<2>(a, outputs, a_width, columns, b_width, count, to + first);
    if (taken == 1) add_outer_columns<1>(a, outputs, a_width, columns, b_width, count, to + first);
    first += taken * kLanes;
  }
}

// A thread's sums over pixels: the gradients of the weights, rows padded to whole vectors.
struct FfnSums {
  float *proj, *proj_bias, *dwc, *dwc_bias, *last, *last_bias;
};

// Adds sums (rows, padded) of all threads up to (rows, columns), or to (columns, rows).
void collect(const std::vector<FfnSums>& sums, float* FfnSums::*which, int64_t rows, int64_t columns, bool transposed,
             float* to) {
  const int64_t padded = round_up(columns, kLanes);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < columns; ++c) {
      float total = 0;
      for (const FfnSums& of_thread : sums) total += (of_thread.*which)[row * padded + c];
      to[transposed ? c * rows + row : row * columns + c] = total;
    }
}

// A ConvFFN and what its gradients need beside it.
template <typename T>
struct FfnGradients {
  const float *x, *first_grad, *out_grad;
  float* x_grad;
  bool add;
  int64_t height, width, channels, hidden, split;
  const Packed<T>&proj, &proj_transposed, &last_transposed;
  const Packed<float>& dwc;

  int64_t outputs() const { return split + channels; }
};

// What one thread works with: lines of one band, three of each kind in turn.
template <typename T>
class FfnBand {
 public:
  static int64_t scratch_size(const FfnGradients<T>& g) {
    const int64_t inputs = round_up(g.channels, kLanes), hidden = g.proj.padded, outputs = round_up(g.outputs(), kLanes);
    const int64_t lines = (g.width + 2) * (17 * hidden + 5 * inputs + 3 * outputs);
    return lines + g.hidden * inputs + g.outputs() * hidden + 11 * hidden + outputs;
  }

  FfnBand(const FfnGradients<T>& g, Scratch& scratch, FfnSums& sums)
      : g_(g), inputs_(round_up(g.channels, kLanes)), hidden_(g.proj.padded),
        outputs_(round_up(g.outputs(), kLanes)), sums_(sums) {
    const int64_t pixels = g.width + 2;
    for (int i = 0; i < 3; ++i) {
      activated_[i] = zeros(scratch, pixels * hidden_);
      mixed_slope_grad_[i] = zeros(scratch, pixels * hidden_);
      slope_[i] = scratch.take(pixels * hidden_);
      mixed_grad_[i] = scratch.take(pixels * hidden_);
      rounded_x_[i] = scratch.take_as<T>(pixels * inputs_);
    }
    none_ = zeros(scratch, pixels * hidden_);
    line_ = scratch.take(pixels * hidden_);
    mixed_ = scratch.take_as<T>(pixels * hidden_);
    hidden_grad_ = scratch.take_as<T>(pixels * hidden_);
    hidden_pairs_ = scratch.take_as<T>(pixels * hidden_);
    x_pairs_ = scratch.take_as<T>(pixels * inputs_);
    x_line_ = scratch.take(pixels * inputs_);
    upstream_ = zeros(scratch, pixels * outputs_);
    rounded_upstream_ = scratch.take_as<T>(pixels * outputs_);
    upstream_pairs_ = scratch.take_as<T>(pixels * outputs_);
    sums = {zeros(scratch, g.hidden * inputs_), zeros(scratch, hidden_),  zeros(scratch, 9 * hidden_),
            zeros(scratch, hidden_),            zeros(scratch, g.outputs() * hidden_), zeros(scratch, outputs_)};
  }

  // The gradients of lines from top to bottom. A line beside them is done twice: its sums belong to another band.
  void run(int64_t image, int64_t top, int64_t bottom) {
    const int64_t first = std::max<int64_t>(top - 1, 0), last = std::min(bottom + 1, g_.height);
    if (first > 0) expand(image, first - 1);
    expand(image, first);
    for (int64_t y = first; y < last; ++y) {
      if (y + 1 < g_.height) expand(image, y + 1);
      mix(image, y, top <= y && y < bottom);
      if (y > top) finish(image, y - 1);
    }
    if (bottom == g_.height) finish(image, bottom - 1);
  }

 private:
  static float* zeros(Scratch& scratch, int64_t floats) {
    float* taken = scratch.take(floats);
    std::fill(taken, taken + floats, 0.0f);
    return taken;
  }

  int64_t pixel(int64_t image, int64_t y) const { return (image * g_.height + y) * g_.width; }

  const float* line_of(float* const ring[3], int64_t y) const {
    return y < 0 || y >= g_.height ? none_ : ring[y % 3];
  }

  // GELU(proj x) and GELU's derivative there.
  void expand(int64_t image, int64_t y) {
    T* rounded = rounded_x_[y % 3];
    round_rows(g_.x + pixel(image, y) * g_.channels, g_.width, g_.channels, inputs_, rounded);
    multiply<false>(g_.proj, rounded, g_.width, inputs_, line_);
    float* to = activated_[y % 3] + hidden_;
    float* slope = slope_[y % 3];
    for (int64_t i = 0; i < g_.width * hidden_; i += kLanes) {
      const GeluAndSlope made(load(line_ + i));
      store(to + i, made.value);
      store(slope + i, made.slope);
    }
  }

  // What the last convolution gets, and its gradient; past it, the depthwise convolution's.
  void mix(int64_t image, int64_t y, bool is_own) {
    const int64_t at = pixel(image, y), outputs = g_.outputs(), width = g_.width;
    for (int64_t x = 0; x < width; ++x) {
      float* to = upstream_ + x * outputs_;
      std::copy_n(g_.first_grad + (at + x) * g_.split, g_.split, to);
      std::copy_n(g_.out_grad + (at + x) * g_.channels, g_.channels, to + g_.split);
    }
    round_rows(upstream_, width, outputs_, outputs_, rounded_upstream_);
    float* grad = mixed_grad_[y % 3];
    multiply<false>(g_.last_transposed, rounded_upstream_, width, outputs_, grad);
    const float* const lines[3] = {line_of(activated_, y - 1), activated_[y % 3], line_of(activated_, y + 1)};
    for (int64_t first = 0; first < hidden_; first += kLanes) {
      Vec tap[9], tap_sum[9] = {};
      for (int t = 0; t < 9; ++t) tap[t] = load(g_.dwc.weight() + t * hidden_ + first);
      const Vec bias = load(g_.dwc.bias() + first);
      Vec sum = {};
      for (int64_t x = 0; x < width; ++x) {
        const int64_t i = x * hidden_ + first;
        const GeluAndSlope made(bias + nine_taps(tap, lines, i, hidden_));
        store_factors(mixed_ + i, load(lines[1] + i + hidden_) + made.value);
        const Vec before = load(grad + i) * made.slope;
        store(mixed_slope_grad_[y % 3] + i + hidden_, before);
        sum += before;
        for (int t = 0; t < 9; ++t) tap_sum[t] += before * load(lines[t / 3] + i + t % 3 * hidden_);
      }
      if (!is_own) continue;
      add_to(sums_.dwc_bias + first, sum);
      for (int t = 0; t < 9; ++t) add_to(sums_.dwc + t * hidden_ + first, tap_sum[t]);
    }
    if (!is_own) return;
    const T* pairs = summed_over_rows(rounded_upstream_, width, outputs_, upstream_pairs_);
    add_outer(pairs, outputs, outputs_, summed_over_rows(mixed_, width, hidden_, hidden_pairs_), hidden_, width,
              sums_.last);
    for (int64_t c = 0; c < outputs_; c += kLanes) {
      Vec sum = {};
      for (int64_t x = 0; x < width; ++x) sum += load(upstream_ + x * outputs_ + c);
      add_to(sums_.last_bias + c, sum);
    }
  }

  // The gradients before the depthwise convolution: of GELU(proj x), of proj and of x.
  void finish(int64_t image, int64_t y) {
    const int64_t width = g_.width, channels = g_.channels;
    const float* const lines[3] = {line_of(mixed_slope_grad_, y - 1), mixed_slope_grad_[y % 3],
                                   line_of(mixed_slope_grad_, y + 1)};
    for (int64_t first = 0; first < hidden_; first += kLanes) {
      Vec tap[9], sum = {};
      for (int t = 0; t < 9; ++t) tap[t] = load(g_.dwc.weight() + (8 - t) * hidden_ + first);
      for (int64_t x = 0; x < width; ++x) {
        const int64_t i = x * hidden_ + first;
        const Vec grad = load(mixed_grad_[y % 3] + i) + nine_taps(tap, lines, i, hidden_);
        const Vec before = grad * load(slope_[y % 3] + i);
        store_factors(hidden_grad_ + i, before);
        sum += before;
      }
      add_to(sums_.proj_bias + first, sum);
    }
    const T* pairs = summed_over_rows(hidden_grad_, width, hidden_, hidden_pairs_);
    add_outer(pairs, g_.hidden, hidden_, summed_over_rows(rounded_x_[y % 3], width, inputs_, x_pairs_), inputs_, width,
              sums_.proj);
    multiply<false>(g_.proj_transposed, hidden_grad_, width, hidden_, x_line_);
    const int64_t at = pixel(image, y) * channels;
    for (int64_t x = 0; x < width; ++x) {
      const float* skip = g_.out_grad + at + x * channels;
      float* to = g_.x_grad + at + x * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = x_line_[x * inputs_ + c] + (g_.add ? skip[c] : 0.0f);
    }
  }

  static void add_to(float* sums, Vec v) { store(sums, load(sums) + v); }

  const FfnGradients<T>& g_;
  const int64_t inputs_, hidden_, outputs_;  // padded
  FfnSums& sums_;
  float *activated_[3], *mixed_slope_grad_[3];  // lines with a pixel of zeros at both ends
  float *slope_[3], *mixed_grad_[3];
  T* rounded_x_[3];
  float *none_, *line_, *x_line_, *upstream_;
  T *mixed_, *hidden_grad_, *hidden_pairs_, *x_pairs_, *rounded_upstream_, *upstream_pairs_;
};

// See esc_conv_ffn_backward.
template <typename T>
void conv_ffn_backward(const float* x, const float* proj_weight, const float* proj_bias, const float* proj_transposed,
                       const float* dwc_weight, const float* dwc_bias, const float* last_transposed,
                       const float* first_grad, const float* out_grad, float* x_grad, float* proj_grad,
                       float* proj_bias_grad, float* dwc_grad, float* dwc_bias_grad, float* last_grad,
                       float* last_bias_grad, int add, int64_t batch, int64_t height, int64_t width, int64_t channels,
                       int64_t hidden, int64_t split, int threads) {
  const int64_t outputs = split + channels;
  const Packed<T> proj(proj_weight, proj_bias, hidden, channels);
  const Packed<T> back_to_x(proj_transposed, nullptr, channels, hidden);
  const Packed<T> back_to_hidden(last_transposed, nullptr, hidden, outputs);
  const Packed<float> dwc(dwc_weight, dwc_bias, hidden, 9);
  const FfnGradients<T> g{x,        first_grad, out_grad, x_grad,    add != 0,       height, width,
                          channels, hidden,     split,    proj,      back_to_x,      back_to_hidden, dwc};
  // Bands of images: as many for each thread. Which thread sums up what is fixed, so that results repeat.
  const int64_t images = std::max<int64_t>(batch, 1), parts = (threads + images - 1) / images;
  const int64_t band = std::max<int64_t>((height + parts - 1) / parts, 1);
  const int64_t bands = (height + band - 1) / band;
  std::vector<Scratch> scratches = scratch_for(threads, FfnBand<T>::scratch_size(g));
  std::vector<FfnSums> sums(threads);
  std::vector<FfnBand<T>> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(g, scratches[i], sums[i]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < batch * bands; ++index) {
    const int64_t top = index % bands * band;
    workers[omp_get_thread_num()].run(index / bands, top, std::min(top + band, height));
  }
  collect(sums, &FfnSums::proj, hidden, channels, false, proj_grad);
  collect(sums, &FfnSums::proj_bias, 1, hidden, false, proj_bias_grad);
  collect(sums, &FfnSums::dwc, 9, hidden, true, dwc_grad);
  collect(sums, &FfnSums::dwc_bias, 1, hidden, false, dwc_bias_grad);
  collect(sums, &FfnSums::last, outputs, hidden, false, last_grad);
  collect(sums, &FfnSums::last_bias, 1, outputs, false, last_bias_grad);
}

}  // namespace

// The gradients of esc_conv_ffn without a LayerNorm, out not being x: of x and of the weights, laid out as they are.
// first_grad, out_grad: of first and out. proj_transposed: (channels, hidden), last_transposed: (hidden, split + channels).
extern "C" int esc_conv_ffn_backward(const float* x, const float* proj_weight, const float* proj_bias,
                                      const float* proj_transposed, const float* dwc_weight, const float* dwc_bias,
                                      const float* last_transposed, const float* first_grad, const float* out_grad,
                                      float* x_grad, float* proj_grad, float* proj_bias_grad, float* dwc_grad,
                                      float* dwc_bias_grad, float* last_grad, float* last_bias_grad, int add, int bf16,
                                      int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden,
                                      int64_t split, int threads) try {
#if defined(ESC_BF16)
  if (bf16) {
    conv_ffn_backward<Bf16>(x, proj_weight, proj_bias, proj_transposed, dwc_weight, dwc_bias, last_transposed, first_grad,
                            out_grad, x_grad, proj_grad, proj_bias_grad, dwc_grad, dwc_bias_grad, last_grad,
                            last_bias_grad, add, batch, height, width, channels, hidden, split, threads);
    return 0;
  }
#endif
  conv_ffn_backward<float>(x, proj_weight, proj_bias, proj_transposed, dwc_weight, dwc_bias, last_transposed, first_grad,
                           out_grad, x_grad, proj_grad, proj_bias_grad, dwc_grad, dwc_bias_grad, last_grad,
                           last_bias_grad, add, batch, height, width, channels, hidden, split, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// ------------------------------------------------------------------------ the large kernel, with its gradients

namespace {

// to (rows, columns) = left (rows, inner) times right (inner, columns), columns whole vectors.
template <int P, int V>
inline void product_block(const float* left, int64_t inner, const float* right, int64_t columns, float* to) {
  Vec total[P][V] = {};
  for (int64_t k = 0; k < inner; ++k) {
    Vec factors[V];
    for (int v = 0; v < V; ++v) factors[v] = load(right + k * columns + v * kLanes);
    for (int i = 0; i < P; ++i)
      for (int v = 0; v < V; ++v) total[i][v] += left[i * inner + k] * factors[v];
  }
  for (int i = 0; i < P; ++i)
    for (int v = 0; v < V; ++v) store(to + i * columns + v * kLanes, total[i][v]);
}

template <int V>
void product_columns(const float* left, int64_t rows, int64_t inner, const float* right, int64_t columns, float* to) {
  int64_t row = 0;
  for (; row + kPixels <= rows; row += kPixels)
    product_block<kPixels, V>(left + row * inner, inner, right, columns, to + row * columns);
  for (; row + 2 <= rows; row += 2)
    product_block<2, V>(left + row * inner, inner, right, columns, to + row * columns);
  for (; row < rows; ++row) product_block<1, V>(left + row * inner, inner, right, columns, to + row * columns);
}

void product(const float* left, int64_t rows, int64_t inner, const float* right, int64_t columns, float* to) {
  int64_t first = 0;
  for (; first + 4 * kLanes <= columns; first += 4 * kLanes)
    product_columns<4>(left, rows, inner, right + first, columns, to + first);
  for (; first < columns; first += kLanes)
    product_columns<1>(left, rows, inner, right + first, columns, to + first);
}

std::vector<float> transposed(const std::vector<float>& matrix, int64_t columns) {
  const int64_t rows = matrix.size() / columns;
  std::vector<float> to(matrix.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * rows + i] = matrix[i * columns + j];
  return to;
}

// The real Fourier basis of tiles that overlap by a kernel's size less 1: see frequency_tiles.py. A vector u of it is the
// constant; then a cosine (u odd) and a sine of each frequency (u + 1) / 2; last the cosine that alternates.
struct Tiles {
  int64_t side, size, kept, margin, frequencies;
  std::vector<float> basis;            // (side, side): a vector a row
  std::vector<float> inner;            // (side, kept): of what is left of a tile without its margins
  std::vector<float> basis_transposed, inner_transposed;
  std::vector<float> cosines;          // (frequencies, size): a kernel's response at each
  std::vector<float> cosines_transposed;

  Tiles(int64_t side, int64_t size)
      : side(side), size(size), kept(side - size + 1), margin(size / 2), frequencies(side / 2 + 1),
        basis(side * side), inner(side * kept), cosines(frequencies * size) {
    const double turn = 2 * std::acos(-1.0) / side;
    std::vector<double> cosine(side), sine(side);
    for (int64_t i = 0; i < side; ++i) cosine[i] = std::cos(turn * i), sine[i] = std::sin(turn * i);
    for (int64_t u = 0; u < side; ++u) {
      const double scale = std::sqrt((u == 0 || u == side - 1 ? 1.0 : 2.0) / side);
      for (int64_t x = 0; x < side; ++x) {
        const int64_t phase = (u + 1) / 2 * x % side;
        const double value = u == 0 || u % 2 == 1 ? cosine[phase] : sine[phase];
        basis[u * side + x] = static_cast<float>(scale * value);
      }
      std::copy_n(&basis[u * side + margin], kept, &inner[u * kept]);
    }
    for (int64_t f = 0; f < frequencies; ++f)
      for (int64_t i = 0; i < size; ++i) cosines[f * size + i] = static_cast<float>(cosine[f * std::abs(i - margin) % side]);
    basis_transposed = transposed(basis, side);
    inner_transposed = transposed(inner, kept);
    cosines_transposed = transposed(cosines, size);
  }
  // The basis vectors of a frequency: from first to last.
  int64_t first(int64_t frequency) const { return std::max<int64_t>(2 * frequency - 1, 0); }
  int64_t last(int64_t frequency) const { return std::min(2 * frequency, side - 1); }
};

// to (n, n, channels) from a tile (m, m, channels) by matrix (n, m) in both directions, vertically first.
void transform(const std::vector<float>& matrix, int64_t n, int64_t m, const float* tile, int64_t channels, float* between,
               float* to) {
  product(matrix.data(), n, m, tile, m * channels, between);
  for (int64_t row = 0; row < n; ++row)
    product(matrix.data(), n, m, between + row * m * channels, channels, to + row * n * channels);
}

// to (out channels) = from (in channels) times response (in channels, out channels) at each of the basis vectors, of
// which up to four have one response. tiles: (side, side, channels).
void mix(const Tiles& t, const float* response, const float* from, int64_t in_channels, int64_t out_channels, float* to) {
  for (int64_t f = 0; f < t.frequencies * t.frequencies; ++f, response += in_channels * out_channels) {
    const int64_t at_u = f / t.frequencies, at_v = f % t.frequencies;
    for (int64_t o = 0; o < out_channels; o += kLanes) {
      const float* rows[4] = {};
      float* sums[4];
      int count = 0;
      for (int64_t u = t.first(at_u); u <= t.last(at_u); ++u)
        for (int64_t v = t.first(at_v); v <= t.last(at_v); ++v, ++count) {
          rows[count] = from + (u * t.side + v) * in_channels;
          sums[count] = to + (u * t.side + v) * out_channels + o;
        }
      for (int i = count; i < 4; ++i) rows[i] = rows[0];
      Vec total[4] = {};
      for (int64_t c = 0; c < in_channels; ++c) {
        const Vec factors = load(response + c * out_channels + o);
        for (int i = 0; i < 4; ++i) total[i] += rows[i][c] * factors;
      }
      for (int i = 0; i < count; ++i) store(sums[i], total[i]);
    }
  }
}

// response_grad (in channels, out channels) += from (in channels) times grad (out channels), at each frequency.
void add_response_grad(const Tiles& t, const float* from, const float* grad, int64_t in_channels, int64_t out_channels,
                       float* response_grad) {
  for (int64_t f = 0; f < t.frequencies * t.frequencies; ++f, response_grad += in_channels * out_channels) {
    const int64_t at_u = f / t.frequencies, at_v = f % t.frequencies;
    for (int64_t u = t.first(at_u); u <= t.last(at_u); ++u)
      for (int64_t v = t.first(at_v); v <= t.last(at_v); ++v) {
        const float* row = from + (u * t.side + v) * in_channels;
        for (int64_t o = 0; o < out_channels; o += kLanes) {
          const Vec factors = load(grad + (u * t.side + v) * out_channels + o);
          for (int64_t c = 0; c < in_channels; ++c) {
            float* sum = response_grad + c * out_channels + o;
            store(sum, load(sum) + row[c] * factors);
          }
        }
      }
  }
}

// Maps of an image, (height, width, channels).
struct Map {
  int64_t height, width, channels;
};

// A square (side, side, channels) of a map from (top, left) on; zeros beyond the map.
void cut(const Map& map, const float* from, int64_t top, int64_t left, int64_t side, float* to) {
  const int64_t first = std::max<int64_t>(-left, 0), last = std::max(first, std::min(side, map.width - left));
  for (int64_t y = 0; y < side; ++y, to += side * map.channels) {
    const bool is_inside = top + y >= 0 && top + y < map.height;
    const int64_t begin = is_inside ? first : side, end = is_inside ? last : side;
    std::fill(to, to + begin * map.channels, 0.0f);
    if (is_inside)
      std::copy_n(from + ((top + y) * map.width + left + begin) * map.channels, (end - begin) * map.channels,
                  to + begin * map.channels);
    std::fill(to + end * map.channels, to + side * map.channels, 0.0f);
  }
}

// Adds a square to a map, or writes it there; what lies beyond the map is left out.
template <bool Add>
void paste(const Map& map, const float* from, int64_t top, int64_t left, int64_t side, float* to) {
  const int64_t first = std::max<int64_t>(-left, 0), last = std::min(side, map.width - left);
  for (int64_t y = std::max<int64_t>(-top, 0); y < std::min(side, map.height - top); ++y) {
    const float* row = from + y * side * map.channels;
    float* target = to + ((top + y) * map.width + left) * map.channels;
    for (int64_t i = first * map.channels; i < last * map.channels; ++i) target[i] = (Add ? target[i] : 0.0f) + row[i];
  }
}

// The response (frequencies, frequencies, in channels, out channels) of a kernel (size, size, in, out channels).
std::vector<float> response_of(const Tiles& t, const float* kernel, int64_t channels_square) {
  std::vector<float> between(t.frequencies * t.size * channels_square);
  std::vector<float> response(t.frequencies * t.frequencies * channels_square);
  product(t.cosines.data(), t.frequencies, t.size, kernel, t.size * channels_square, between.data());
  for (int64_t f = 0; f < t.frequencies; ++f)
    product(t.cosines.data(), t.frequencies, t.size, &between[f * t.size * channels_square], channels_square,
            &response[f * t.frequencies * channels_square]);
  return response;
}

}  // namespace

// Convolution with zero padding by a kernel that is equal to its own flips, in tiles of `side`, even.
// x: (batch, height, width, in_channels), kernel: (size, size, in_channels, out_channels), out: as x. Channels: whole
// vectors.
extern "C" int esc_large_kernel(const float* x, const float* kernel, float* out, int64_t side, int64_t size, int64_t batch,
                                 int64_t height, int64_t width, int64_t in_channels, int64_t out_channels,
                                 int threads) try {
  const Tiles t(side, size);
  const std::vector<float> response = response_of(t, kernel, in_channels * out_channels);
  const Map in{height, width, in_channels}, made{height, width, out_channels};
  const int64_t rows = (height + t.kept - 1) / t.kept, columns = (width + t.kept - 1) / t.kept;
  const int64_t square = side * side * std::max(in_channels, out_channels);
  std::vector<Scratch> scratches = scratch_for(threads, 2 * square + 8 * kLanes);
#pragma omp parallel num_threads(threads)
  {
    Scratch& scratch = scratches[omp_get_thread_num()];
    float *tile = scratch.take(square), *between = scratch.take(square);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < batch * rows * columns; ++index) {
      const int64_t image = index / (rows * columns);
      const int64_t top = index % (rows * columns) / columns * t.kept, left = index % columns * t.kept;
      cut(in, x + image * height * width * in_channels, top - t.margin, left - t.margin, side, tile);
      transform(t.basis, side, side, tile, in_channels, between, tile);
      mix(t, response.data(), tile, in_channels, out_channels, between);
      transform(t.inner_transposed, t.kept, side, between, out_channels, tile, between);
      paste<false>(made, between, top, left, t.kept, out + image * height * width * out_channels);
    }
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// The gradients of esc_large_kernel: x_grad and kernel_grad are laid out as x and kernel.
extern "C" int esc_large_kernel_backward(const float* x, const float* kernel, const float* out_grad, float* x_grad,
                                          float* kernel_grad, int64_t side, int64_t size, int64_t batch, int64_t height,
                                          int64_t width, int64_t in_channels, int64_t out_channels, int threads) try {
  const Tiles t(side, size);
  const int64_t matrix = in_channels * out_channels;
  // From out channels to in channels.
  std::vector<float> back(size * size * matrix);
  for (int64_t tap = 0; tap < size * size; ++tap)
    for (int64_t i = 0; i < in_channels; ++i)
      for (int64_t o = 0; o < out_channels; ++o)
        back[tap * matrix + o * in_channels + i] = kernel[tap * matrix + i * out_channels + o];
  const std::vector<float> response = response_of(t, back.data(), matrix);
  const Map in{height, width, in_channels}, made{height, width, out_channels};
  const int64_t rows = (height + t.kept - 1) / t.kept, columns = (width + t.kept - 1) / t.kept;
  const int64_t square = side * side * std::max(in_channels, out_channels);
  std::vector<Scratch> scratches = scratch_for(threads, 3 * square + 8 * kLanes);
  const int64_t all = t.frequencies * t.frequencies * matrix;
  std::vector<std::vector<float>> sums(threads);  // of a thread: the response's gradient
  for (auto& each : sums) each.resize(all);
  // Tiles overlap, so that an image is one thread's. Which thread sums up what is fixed, so that results repeat.
#pragma omp parallel num_threads(threads)
  {
    Scratch& scratch = scratches[omp_get_thread_num()];
    float *grads = scratch.take(square), *tile = scratch.take(square), *between = scratch.take(square);
    float* response_grad = sums[omp_get_thread_num()].data();
#pragma omp for schedule(static)
    for (int64_t image = 0; image < batch; ++image) {
      float* to = x_grad + image * height * width * in_channels;
      std::fill(to, to + height * width * in_channels, 0.0f);
      for (int64_t index = 0; index < rows * columns; ++index) {
        const int64_t top = index / columns * t.kept, left = index % columns * t.kept;
        cut(in, x + image * height * width * in_channels, top - t.margin, left - t.margin, side, tile);
        transform(t.basis, side, side, tile, in_channels, between, tile);
        cut(made, out_grad + image * height * width * out_channels, top, left, t.kept, grads);
        transform(t.inner, side, t.kept, grads, out_channels, between, grads);
        add_response_grad(t, tile, grads, in_channels, out_channels, response_grad);
        mix(t, response.data(), grads, out_channels, in_channels, between);
        transform(t.basis_transposed, side, side, between, in_channels, tile, between);
        paste<true>(in, between, top - t.margin, left - t.margin, side, to);
      }
    }
  }
  for (int i = 1; i < threads; ++i)
    for (int64_t j = 0; j < all; ++j) sums[0][j] += sums[i][j];
  std::vector<float> between(t.frequencies * size * matrix);
  for (int64_t f = 0; f < t.frequencies; ++f)
    product(t.cosines_transposed.data(), size, t.frequencies, &sums[0][f * t.frequencies * matrix], matrix,
            &between[f * size * matrix]);
  product(t.cosines_transposed.data(), size, t.frequencies, between.data(), size * matrix, kernel_grad);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

extern "C" int esc_lanes() { return kLanes; }

extern "C" int esc_has_bf16() {
#if defined(ESC_BF16)
  return 1;
#else
  return 0;
#endif
}

// Whether bfloat16 is multiplied by AMX's tiles, which PyTorch's convolutions use, too.
extern "C" int esc_has_amx() {
#if defined(ESC_TILES)
  return may_use_tiles();
#else
  return 0;
#endif
}
