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

// x * (1 + erf(x / sqrt 2)) / 2, error at most 7e-7 for |x| < 8 and 1e-7 of |x| beyond: half of erf is x times a
// polynomial of x^2 up to kGeluEnd, and constant from there.
inline Vec gelu(Vec x) {
  const Vec clipped = vmin(fill(kGeluEnd), vmax(fill(-kGeluEnd), x));
  const Vec u = clipped * clipped * (2 / (kGeluEnd * kGeluEnd)) - 1.0f;
  Vec p = fill(kGelu[kGeluTerms - 1]);
  for (int i = kGeluTerms - 2; i >= 0; --i) p = p * u + kGelu[i];
  return x * (clipped * p + 0.5f);
}

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

void scatter(const Attention& a, const Task& task, const float* from, float scale, float* map, int64_t pixel_stride) {
  for (int64_t key = 0; key < a.keys(); ++key) {
    float* row = map + task.pixel(a, key) * pixel_stride;
    for (int64_t c = 0; c < a.channels; ++c) row[c] = from[key * a.padded_channels() + c] * scale;
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

// to[key] += sum over i of weights[i][key] * rows[i], for kQueries rows i.
template <int V>
void add_weighted(const Attention& a, const float* weights, const float* rows, float* to) {
  const int64_t keys = a.score_stride();
  for (int v = 0; v < V; ++v) {
    Vec row[kQueries];
    for (int i = 0; i < kQueries; ++i) row[i] = load(rows + (i * V + v) * kLanes);
    for (int64_t key = 0; key < a.keys(); ++key) {
      float* at = to + (key * V + v) * kLanes;
      Vec total = load(at);
      for (int i = 0; i < kQueries; ++i) total += weights[i * keys + key] * row[i];
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

WeighRows<float> add_weighted_of(const Attention& a) {
  constexpr WeighRows<float> forms[] = {add_weighted<1>, add_weighted<2>, add_weighted<3>, add_weighted<4>};
  return forms[a.padded_channels() / kLanes - 1];
}

std::unique_ptr<float[]> scaled_table(const Attention& a, const float* table, float scale) {
  const int64_t entries = a.side() * a.side(), all = a.heads * entries;
  std::unique_ptr<float[]> scaled(new float[all]);
  for (int64_t i = 0; i < all; ++i) scaled[i] = table[i] * scale;
  return scaled;
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
          const float* row = scores + i * a.score_stride();
          T* weights = reinterpret_cast<T*>(scores + i * a.score_stride());  // in the scores' place
          const float most = largest(highest[i]);
          Vec even = {}, odd = {};
          for (int64_t key = 0; key < padded_keys; key += 2 * kLanes) {
            const Vec first = exp2_of<T>((load(row + key) - most) * unit);
            const Vec second = exp2_of<T>((load(row + key + kLanes) - most) * unit);
            store_factors(weights + key, first);
            store_factors(weights + key + kLanes, second);
            even += first;
            odd += second;
          }
          sums[i] = sum(even + odd);
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
    Bf16* weights = reinterpret_cast<Bf16*>(scores);
    Vec even = fill(highest[i]), odd = even;
    for (int64_t key = 0; key < count; key += 2 * kLanes) {
      even = vmax(even, load(scores + key));
      odd = vmax(odd, load(scores + key + kLanes));
    }
    const float most = _mm512_reduce_max_ps(vmax(even, odd));
    const Vec factor = exp2_negative(fill((highest[i] - most) * unit));
    highest[i] = most;
    even = sums[i] * factor;
    odd = Vec{};
    for (int64_t key = 0; key < count; key += 2 * kLanes) {
      const Vec first = exp2_of<Bf16>((load(scores + key) - most) * unit);
      const Vec second = exp2_of<Bf16>((load(scores + key + kLanes) - most) * unit);
      store_factors(weights + key, first);
      store_factors(weights + key + kLanes, second);
      even += first;
      odd += second;
    }
    sums[i] = even + odd;
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
// log_sums: (batch * rows * columns * heads, window^2) in units of log2, for the gradients in float32; may be null.
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

// The gradients of esc_window_attention: out_grad, qkv_grad and table_grad are laid out as out, qkv and table.
// table_grad is of each image and window, (batch * rows * columns, heads, (2 window - 1)^2), to be summed.
extern "C" int esc_window_attention_backward(const float* qkv, const float* table, const float* out,
                                              const float* log_sums,
                                              const float* out_grad, float* qkv_grad, float* table_grad, int64_t batch,
                                              int64_t rows, int64_t columns, int64_t window, int64_t heads,
                                              int64_t channels, int threads) try {
  const Attention a{batch, rows, columns, window, heads, channels};
  const int64_t keys = a.keys(), padded_keys = a.padded_keys(), padded = a.padded_channels(), dim = a.dim();
  const int64_t entries = a.side() * a.side();
  const auto scaled = scaled_table(a, table, kLog2E);
  const float root = 1 / std::sqrt(static_cast<float>(channels));
  const WeighRows<float> weigh = weigh_rows_of<float>(a), add = add_weighted_of(a);
  const int64_t square = padded_keys * padded;
  const int64_t score_block = kQueries * a.score_stride();
  std::vector<Scratch> scratches =
      scratch_for(threads, 8 * square + 2 * padded_keys * channels + 2 * score_block + entries + 16 * kLanes);
#pragma omp parallel num_threads(threads)
  {
    Scratch& scratch = scratches[omp_get_thread_num()];
    float* q = scratch.take(square);
    float* upstream = scratch.take(square);
    float* k = scratch.take(square);
    float* v = scratch.take(square);
    float* attended = scratch.take(square);
    float* k_transposed = scratch.take(padded_keys * channels);
    float* v_transposed = scratch.take(padded_keys * channels);
    float* q_grad = scratch.take(square);
    float* k_grad = scratch.take(square);
    float* v_grad = scratch.take(square);
    float* scores = scratch.take(score_block);
    float* products = scratch.take(score_block);
    float* bias_grad = scratch.take(entries);
    float* zeros = scratch.take(2 * kLanes);
    std::fill(zeros, zeros + 2 * kLanes, 0.0f);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < a.tasks(); ++index) {
      const Task task(a, index);
      const float* from = qkv + task.head * channels;
      gather<1>(a, task, from, 3 * dim, q);
      gather<1>(a, task, from + dim, 3 * dim, k);
      gather<1>(a, task, from + 2 * dim, 3 * dim, v);
      gather<1>(a, task, out + task.head * channels, dim, attended);
      gather<1>(a, task, out_grad + task.head * channels, dim, upstream);
      multiply_by(root * kLog2E, q, square);
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
        for (int i = 0; i < kQueries; ++i) {
          float* weights = scores + i * a.score_stride();
          float* product = products + i * a.score_stride();
          if (query + i >= keys) {
            std::fill(weights, weights + padded_keys, 0.0f);
            std::fill(product, product + padded_keys, 0.0f);
            continue;
          }
          const int64_t at = query + i, y = at / window, x = at % window;
          float expected = 0;
          for (int64_t c = 0; c < channels; ++c) expected += upstream[at * padded + c] * attended[at * padded + c];
          const float log_sum = log_sums[index * keys + at];
          for (int64_t key = 0; key < padded_keys; key += kLanes) {
            const Vec weight = exp2_negative(load(weights + key) - log_sum);
            store(weights + key, weight);
            store(product + key, weight * (load(product + key) - expected));
          }
          for (int64_t key_row = 0; key_row < window; ++key_row) {
            float* to = bias_grad + (key_row - y + window - 1) * a.side() + window - 1 - x;
            const float* add_from = product + key_row * window;
            for (int64_t c = 0; c < window; ++c) to[c] += add_from[c];
          }
        }
        weigh(a, products, k, q_grad + query * padded);
        // q carries log2(e) / sqrt(channels); what it must carry here is 1 / sqrt(channels): see the scatter.
        add(a, products, q + query * padded, k_grad);
        add(a, scores, upstream + query * padded, v_grad);
      }
      float* to = qkv_grad + task.head * channels;
      scatter(a, task, q_grad, root, to, 3 * dim);
      scatter(a, task, k_grad, 1 / kLog2E, to + dim, 3 * dim);
      scatter(a, task, v_grad, 1, to + 2 * dim, 3 * dim);
      const int64_t of_window = index % (a.batch * a.rows * a.columns);
      std::memcpy(table_grad + (of_window * heads + task.head) * entries, bias_grad, entries * sizeof(float));
    }
  }
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

// A matrix (outputs, inputs) in the order in which it is multiplied, padded to whole vectors, and its bias. What it is
// multiplied by has rows of `depth` numbers, padded with zeros.
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
      bias_memory[o] = bias[o];
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
      Vec line_total[3];
      for (int y = 0; y < 3; ++y) {
        const float* at = lines[y] + x * padded + first;
        line_total[y] = tap[3 * y] * load(at) + tap[3 * y + 1] * load(at + padded) +
                        tap[3 * y + 2] * load(at + 2 * padded);
      }
      const Vec total = bias + line_total[0] + (line_total[1] + line_total[2]);
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
