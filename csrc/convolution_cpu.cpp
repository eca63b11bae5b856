// y[b, s, o] = bias[o] + sum over i and the taps t in {-1, 0, 1}^axes of weight[o, i, t] x[b, s + t, i],  x = 0 outside
// grad_x is the same of grad_y, taps mirrored, channels exchanged; grad_weight[o, i, t] = sum_bs grad_y[b, s, o] x[b, s + t, i]
//
// By Winograd's transforms (winograd.h): F(4, 3) along the last axis, along the one before it where that rounds no more than
// twice as badly as the plain sum, else F(2, 3), and F(2, 3) along the first of three; the last two change places where far
// fewer tiles cover a plane so. In a volume these are 144 products for the 864 of a tile of 2 x 4 x 4 voxels, or 96 for the
// 432 of 2 x 2 x 4. The products of all channels are matrix products, one for each of a tile's points. A volume's points are
// computed slice by slice, 6 x 6 or 4 x 6 of them: each has to do with two planes of x, and one or two of y.
#include "kernels.h"
#include "matrix_blocks.h"
#include "narrow_convolution.h"
#include "tiles.h"
#include "winograd.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

constexpr int LINE_POINTS = 6, LINE_VOXELS = 4;  // of a tile, along the last axis
constexpr int LINE_VECTORS = CHANNELS / WIDTH;   // of the channels that are transformed together
constexpr int64_t SUMMED_CHANNELS = 64;          // whose products are added up in a row
constexpr int64_t SUM_TILES = 1024;              // that the weight's gradient sums in float32
constexpr int64_t RUN = 16, RUNS = 16;           // chunks in a row that are one thread's, at most; runs of a thread, at least
constexpr int MOST_LINES = 64;                   // of x that are fetched while a chunk is computed
constexpr int64_t PREFETCHED = 4;                // voxels ahead

// A tile has four lines where a result or a weight's gradient sums so many products that it rounds no worse than some two
// times the plain sum, and where the weight's matrices stay in the caches.
constexpr int64_t TALL_PRODUCTS = 27 * 32, TALL_VOXELS = 1 << 16, TALL_WEIGHTS = 1 << 20;

// How many tiles are a thread's at once: what fits, for most numbers of channels, into that much scratch.
struct Chunk {
  int64_t bytes, fewest, most;  // tiles in multiples of ROWS
};
constexpr Chunk FORWARD{128 << 10, 2 * ROWS, 96}, WEIGHT{256 << 10, 24, 96};  // the weight's sums are read once a chunk
// From so many I O on a slice's matrices leave the caches in between.
constexpr int64_t FEWEST_OF_WIDE = 6 * ROWS, WIDE = 1 << 15;

// The transforms along the first axis, for each of its points.
constexpr int NEAR[4] = {0, 1, 2, 1}, FAR[4] = {2, 2, 1, 3};  // planes of d in B^T d,
constexpr bool SUM[4] = {false, true, false, false};           // their sum, or else the near one less the far one
constexpr float RESULT[2][4] = {{1, 1, 1, 0}, {0, 1, -1, -1}};   // A^T
constexpr float GRADIENT[2][4] = {{1, 1, 1, 0}, {0, 1, -1, 1}};  // A^T but for the last sign, see transform_sums

// Of a plane, where lines of a tile run along the side W.
INLINE int64_t tiles_of_plane(int64_t lines, int64_t H, int64_t W) { return ceil_div(H, lines) * ceil_div(W, LINE_VOXELS); }

// Whether tiles whose lines run along the last axis but one are so many fewer that reading voxels that lie apart pays.
INLINE bool turns(int64_t lines, const Convolution& a) {
  return 8 * tiles_of_plane(lines, a.W, a.H) <= 7 * tiles_of_plane(lines, a.H, a.W);
}

template <bool IN_VOLUME, int HEIGHT>
struct Tiles {
  static constexpr bool VOLUME = IN_VOLUME;
  static constexpr int SLICES = VOLUME ? 4 : 1, OUT_DEPTH = VOLUME ? 2 : 1, KERNEL_DEPTH = VOLUME ? 3 : 1;
  static constexpr int TAPS = 9 * KERNEL_DEPTH;
  static constexpr int LINES = HEIGHT, POINT_LINES = LINES + 2;  // of voxels and of points, along the last axis but one
  static constexpr int POINTS = POINT_LINES * LINE_POINTS;       // of a slice
  using Slice = vfloat[POINT_LINES][LINE_POINTS];

  bool turned;                   // lines run along the last axis but one: H is the image's W, and W its H
  int64_t D, H, W;               // in voxels
  int64_t line_step, voxel_step;  // to the next line, and to the next voxel of a line, in voxels
  int64_t depth, height, width;  // in tiles
  int64_t count, chunk;          // tiles; of a chunk at most

  Tiles(const Convolution& a, const Chunk& limits) : turned(turns(LINES, a)), D(a.D) {
    H = turned ? a.W : a.H, line_step = turned ? 1 : a.W;
    W = turned ? a.H : a.W, voxel_step = turned ? a.W : 1;
    depth = VOLUME ? ceil_div(D, 2) : D;
    height = ceil_div(H, LINES);
    width = ceil_div(W, LINE_VOXELS);
    count = a.B * depth * height * width;
    const int64_t affordable = limits.bytes / (POINTS * (a.I + a.O) * int64_t(sizeof(float)));
    const int64_t fewest = a.I * a.O < WIDE ? limits.fewest : FEWEST_OF_WIDE;
    chunk = maximum(fewest, minimum(limits.most, affordable / ROWS * ROWS));
  }

  // About as large, in as many chunks for every thread.
  int64_t balanced_chunk(int threads) const {
    const int64_t chunks = maximum(1, (2 * count + chunk * threads) / (2 * chunk * threads)) * threads;
    return maximum(ROWS, round_up(ceil_div(count, chunks), ROWS));
  }

  struct Row {               // tiles that follow each other along the last axis
    int64_t image, z, y, x;  // the first voxel of the first tile
    int64_t n;
  };

  INLINE Row row(int64_t tile, int64_t last) const {
    const int64_t line = tile / width, x = tile - line * width;
    const int64_t plane = line / height, y = line - plane * height;
    const int64_t image = plane / depth, z = plane - image * depth;
    return {image, z * OUT_DEPTH, y * LINES, x * LINE_VOXELS, minimum(width - x, last - tile)};
  }

  // Runs work(row, number of its first tile) on the rows of the tiles first to last.
  template <class Work>
  INLINE void for_rows(int64_t first, int64_t last, const Work& work) const {
    for (int64_t tile = first; tile < last;) {
      const Row next = row(tile, last);
      work(next, tile - first);
      tile += next.n;
    }
  }

  // The number of the first voxel of a line, below 0 outside.
  INLINE int64_t line(int64_t image, int64_t z, int64_t y) const {
    return z >= 0 && z < D && y >= 0 && y < H ? (image * D + z) * H * W + y * line_step : -1;
  }
};

// The points of one slice of a chunk's tiles as [channels / BLOCK, tile, point, BLOCK]: tiles and points are constants apart.
template <class T, int64_t BLOCK>
struct Points {
  static constexpr int64_t PITCH = T::POINTS * BLOCK + CHANNELS;  // tiles a power of two apart would share few cache sets

  float* values;
  int64_t chunk;

  static int64_t count(int64_t channels, int64_t chunk) { return channels / BLOCK * chunk * PITCH; }

  INLINE int64_t block_stride() const { return chunk * PITCH; }
  INLINE float* at(int64_t channel, int64_t tile) const {
    return values + channel / BLOCK * block_stride() + tile * PITCH + channel % BLOCK;
  }
};

// One point of tiles as the rows of a product, in `blocks` blocks of channels.
template <class T>
struct PointRows {
  static constexpr int64_t stride = Points<T, CHANNELS>::PITCH;

  const float* first;
  int64_t block_stride;
  int blocks;

  INLINE int count() const { return blocks; }
  INLINE const float* segment(int s) const { return first + s * block_stride; }
  INLINE void fetch(int, int) const {}
};

// Runs work(tiles) with tiles of four lines where they take fewer products than those of two, and `tall` allows them.
template <class Work>
void with_tiles(const Convolution& a, const Chunk& limits, bool tall, const Work& work) {
  const auto products = [&](int64_t lines) {
    return (lines + 2) * (turns(lines, a) ? tiles_of_plane(lines, a.W, a.H) : tiles_of_plane(lines, a.H, a.W));
  };
  tall = tall && a.taps() * a.I * a.O < TALL_WEIGHTS && products(4) < products(2);
  if (tall)
    a.volume ? work(Tiles<true, 4>(a, limits)) : work(Tiles<false, 4>(a, limits));
  else
    a.volume ? work(Tiles<true, 2>(a, limits)) : work(Tiles<false, 2>(a, limits));
}

// The lines that a row of tiles reads in a plane of x.
template <class T>
struct LinesOfRow {
  const float* lines[T::POINT_LINES];

  LinesOfRow(const T& tiles, const typename T::Row& row, int64_t z, const float* x, const float* zeros, int64_t I) {
    for (int y = 0; y < T::POINT_LINES; ++y) {
      const int64_t voxel = tiles.line(row.image, z, row.y - 1 + y);
      lines[y] = voxel < 0 ? zeros : x + voxel * I;
    }
  }

  INLINE vfloat at(int y, int64_t offset) const { return load(lines[y] + offset); }
  INLINE void fetch(int y, int64_t offset) const { __builtin_prefetch(lines[y] + offset); }
};

// points <- B^T d of CHANNELS channels from i on of a row of tiles, with near + far or near - far along the first axis
template <bool ADD, class T>
void gather_row(const T& tiles, const typename T::Row& row, const LinesOfRow<T>& near, const LinesOfRow<T>& far, int64_t I,
                int64_t i, float* points) {
  constexpr int POINT_LINES = T::POINT_LINES;
  const int64_t step = tiles.voxel_step * I;
  using Column = vfloat[LINE_VECTORS][POINT_LINES];  // transformed along all axes but the last
  const auto load_column = [&](int64_t at, Column& column) {
    if (at < 0 || at >= tiles.W) {
      for (auto& d : column)
        for (vfloat& value : d) value = vfloat{};
      return;
    }
#pragma GCC unroll 6
    for (int y = 0; y < POINT_LINES; ++y) {
      near.fetch(y, (at + PREFETCHED) * step + i);
      if constexpr (T::VOLUME) far.fetch(y, (at + PREFETCHED) * step + i);
    }
#pragma GCC unroll 4
    for (int v = 0; v < LINE_VECTORS; ++v) {
      const int64_t offset = at * step + i + v * WIDTH;
      vfloat d[POINT_LINES];
#pragma GCC unroll 6
      for (int y = 0; y < POINT_LINES; ++y) {
        d[y] = near.at(y, offset);
        if constexpr (T::VOLUME) d[y] = ADD ? d[y] + far.at(y, offset) : d[y] - far.at(y, offset);
      }
      transform_input(d);
#pragma GCC unroll 6
      for (int y = 0; y < POINT_LINES; ++y) column[v][y] = d[y];
    }
  };
  Column columns[LINE_POINTS];
  for (int c = 0; c < 2; ++c) load_column(row.x - 1 + c, columns[c]);
  for (int64_t t = 0; t < row.n; ++t) {
    // In a loop: unrolled, every column would have pointers of its own to keep.
#pragma GCC unroll 1
    for (int c = 2; c < LINE_POINTS; ++c) load_column(row.x - 1 + t * LINE_VOXELS + c, columns[c]);
    float* point = points + t * Points<T, CHANNELS>::PITCH;
#pragma GCC unroll 4
    for (int v = 0; v < LINE_VECTORS; ++v)
#pragma GCC unroll 6
      for (int y = 0; y < POINT_LINES; ++y) {
        vfloat d[LINE_POINTS];
#pragma GCC unroll 6
        for (int c = 0; c < LINE_POINTS; ++c) d[c] = columns[c][v][y];
        // Tiles share two columns with the next.
        columns[0][v][y] = d[LINE_VOXELS];
        columns[1][v][y] = d[LINE_VOXELS + 1];
        transform_input(d);
#pragma GCC unroll 6
        for (int c = 0; c < LINE_POINTS; ++c) store(point + (y * LINE_POINTS + c) * CHANNELS + v * WIDTH, d[c]);
      }
  }
}

// points <- one slice of B^T d of the tiles first to last of x.
template <class T>
void gather_input(const T& tiles, int slice, const float* x, const float* zeros, int64_t I, int64_t first, int64_t last,
                  Points<T, CHANNELS> points) {
  tiles.for_rows(first, last, [&](const typename T::Row& row, int64_t number) {
    const int64_t near_z = T::VOLUME ? row.z - 1 + NEAR[slice] : row.z, far_z = T::VOLUME ? row.z - 1 + FAR[slice] : row.z;
    const LinesOfRow<T> near(tiles, row, near_z, x, zeros, I), far(tiles, row, far_z, x, zeros, I);
    for (int64_t i = 0; i < I; i += CHANNELS) {
      float* to = points.at(i, number);
      SUM[slice] ? gather_row<true>(tiles, row, near, far, I, i, to) : gather_row<false>(tiles, row, near, far, I, i, to);
    }
  });
}

// Asks for lines of x that the next chunk is the first to read, a few at a time while products are computed: asked for all
// at once, they would keep the products from the caches.
template <class T>
struct NextLines {
  static constexpr int64_t CACHE_LINE = CHANNELS;  // in values

  const float *at[MOST_LINES], *end[MOST_LINES];
  int count = 0, line = 0;
  int64_t per_step = 0;

  NextLines(const ConvolutionForward& a, const T& tiles, int64_t first, int64_t last, int64_t steps) {
    if (tiles.turned || !streams(a.x, a.voxels() * a.I * int64_t(sizeof(float)))) return;
    int64_t cache_lines = 0;
    tiles.for_rows(first, last, [&](const typename T::Row& row, int64_t) {
      // Tiles share two lines with those above, and two planes with those before.
      for (int z = 0; z < T::OUT_DEPTH; ++z)
        for (int y = 0; y < T::LINES; ++y) {
          const int64_t voxel = tiles.line(row.image, T::VOLUME ? row.z + 1 + z : row.z, row.y + 1 + y);
          if (voxel < 0 || count == MOST_LINES) continue;
          at[count] = a.x + (voxel + row.x) * a.I;
          end[count] = at[count] + minimum(row.n * LINE_VOXELS, tiles.W - row.x) * a.I;
          cache_lines += (end[count] - at[count]) / CACHE_LINE;
          ++count;
        }
    });
    per_step = ceil_div(cache_lines, steps);
  }

  INLINE void step() {
    for (int64_t n = 0; n < per_step && line < count; ++n) {
      __builtin_prefetch(at[line], 0, 2);
      at[line] += CACHE_LINE;
      if (at[line] >= end[line]) ++line;
    }
  }
};

// What a slice has to do with one of a row's planes of y.
template <int LINES>
struct Plane {
  int z;
  float factor;
  bool first, last;  // slice that has to do with it
  int64_t lines[LINES];  // below 0 outside
};

// sums[o / BLOCK, tile, z, line, voxel, BLOCK] <- sums + one slice of A^T points, beginning with the initial values;
// of the last slice that has to do with a plane they are y.
template <class T, int64_t BLOCK>
void scatter_result(const T& tiles, int slice, Points<T, BLOCK> points, int64_t O, int64_t first, int64_t last,
                    const float* initial, float* sums, const Finish& finish) {
  constexpr int DEPTH = T::OUT_DEPTH, LINES = T::LINES;
  const int64_t step = tiles.voxel_step * O;
  tiles.for_rows(first, last, [&](const typename T::Row& row, int64_t number) {
    Plane<LINES> planes[DEPTH];
    int count = 0;
    for (int z = 0; z < DEPTH; ++z) {
      const float factor = T::VOLUME ? RESULT[z][slice] : 1;
      if (factor == 0 || tiles.line(row.image, row.z + z, row.y) < 0) continue;
      Plane<LINES>& plane = planes[count++];
      plane = {z, factor, slice == z, slice == z + T::KERNEL_DEPTH - 1, {}};
      for (int line = 0; line < LINES; ++line) plane.lines[line] = tiles.line(row.image, row.z + z, row.y + line);
    }
    for (int64_t t = 0; t < row.n; ++t) {
      const int64_t x = row.x + LINE_VOXELS * t, voxels = minimum(LINE_VOXELS, tiles.W - x);
      for (int64_t o = 0; o < O; o += WIDTH) {
        vfloat m[LINES][LINE_POINTS];
        const float* point = points.at(o, number + t);
#pragma GCC unroll 6
        for (int c = 0; c < LINE_POINTS; ++c) {
          vfloat column[T::POINT_LINES];
#pragma GCC unroll 6
          for (int y = 0; y < T::POINT_LINES; ++y) column[y] = load(point + (y * LINE_POINTS + c) * BLOCK);
          transform_result(column);
#pragma GCC unroll 4
          for (int line = 0; line < LINES; ++line) m[line][c] = column[line];
        }
#pragma GCC unroll 4
        for (int line = 0; line < LINES; ++line) transform_result(m[line]);
        float* tile_sums = sums + (o / BLOCK * points.chunk + number + t) * (DEPTH * LINES * LINE_VOXELS * BLOCK) + o % BLOCK;
        for (const Plane<LINES>* plane = planes; plane < planes + count; ++plane) {
#pragma GCC unroll 4
          for (int line = 0; line < LINES; ++line) {
            if (plane->lines[line] < 0) continue;
            float* sum = tile_sums + (plane->z * LINES + line) * (LINE_VOXELS * BLOCK);
            vfloat v[LINE_VOXELS];
#pragma GCC unroll 4
            for (int c = 0; c < LINE_VOXELS; ++c)
              v[c] = load(plane->first ? initial + o : sum + c * BLOCK) + plane->factor * m[line][c];
            if (!plane->last) {
#pragma GCC unroll 4
              for (int c = 0; c < LINE_VOXELS; ++c) store(sum + c * BLOCK, v[c]);
              continue;
            }
            const Finish put = finish.from(plane->lines[line] * O + x * step + o);
            if (voxels == LINE_VOXELS) {
#pragma GCC unroll 4
              for (int c = 0; c < LINE_VOXELS; ++c) put(c * step, v[c]);
            } else {
              for (int c = 0; c < voxels; ++c) put(c * step, v[c]);
            }
          }
        }
      }
    }
  });
}

// points <- one slice of A grad_y, but for signs
template <class T, int64_t BLOCK>
void gather_gradient(const T& tiles, int slice, const float* grad_y, int64_t O, int64_t first, int64_t last,
                     Points<T, BLOCK> points) {
  const int64_t step = tiles.voxel_step * O;
  tiles.for_rows(first, last, [&](const typename T::Row& row, int64_t number) {
    for (int64_t t = 0; t < row.n; ++t) {
      const int64_t x = row.x + LINE_VOXELS * t;
      for (int64_t o = 0; o < O; o += WIDTH) {
        vfloat d[T::LINES][LINE_POINTS];
#pragma GCC unroll 4
        for (int line = 0; line < T::LINES; ++line) {
          for (int c = 0; c < LINE_VOXELS; ++c) d[line][c] = vfloat{};
#pragma GCC unroll 2
          for (int z = 0; z < T::OUT_DEPTH; ++z) {
            const float factor = T::VOLUME ? GRADIENT[z][slice] : 1;
            const int64_t voxel = tiles.line(row.image, row.z + z, row.y + line);
            if (factor == 0 || voxel < 0) continue;
            const float* in = grad_y + voxel * O + x * step + o;
#pragma GCC unroll 4
            for (int c = 0; c < LINE_VOXELS; ++c) {
              __builtin_prefetch(in + (c + PREFETCHED) * step);
              if (x + c < tiles.W) d[line][c] += factor * load(in + c * step);
            }
          }
          transform_gradient(d[line]);
        }
        float* point = points.at(o, number + t);
#pragma GCC unroll 6
        for (int c = 0; c < LINE_POINTS; ++c) {
          vfloat column[T::POINT_LINES];
#pragma GCC unroll 4
          for (int line = 0; line < T::LINES; ++line) column[line] = d[line][c];
          transform_gradient(column);
#pragma GCC unroll 6
          for (int y = 0; y < T::POINT_LINES; ++y) store(point + (y * LINE_POINTS + c) * BLOCK, column[y]);
        }
      }
    }
  });
}

// Run transform on the points along one axis of a weight's slices, for those of the other axes that are in use.
template <class T, class Transform>
INLINE void along_z(typename T::Slice* g, const Transform& transform) {
  for (int y = 0; y < T::POINT_LINES; ++y)
    for (int x = 0; x < LINE_POINTS; ++x) {
      vfloat line[] = {g[0][y][x], g[1][y][x], g[2][y][x], g[3][y][x]};
      transform(line);
      for (int z = 0; z < 4; ++z) g[z][y][x] = line[z];
    }
}
template <class T, class Transform>
INLINE void along_y(typename T::Slice* g, const Transform& transform) {
  for (int z = 0; z < T::KERNEL_DEPTH; ++z)
    for (int x = 0; x < LINE_POINTS; ++x) {
      vfloat line[T::POINT_LINES];
      for (int y = 0; y < T::POINT_LINES; ++y) line[y] = g[z][y][x];
      transform(line);
      for (int y = 0; y < T::POINT_LINES; ++y) g[z][y][x] = line[y];
    }
}
template <class T, class Transform>
INLINE void along_x(typename T::Slice* g, const Transform& transform) {
  for (int z = 0; z < T::KERNEL_DEPTH; ++z)
    for (int y = 0; y < 3; ++y) transform(g[z][y]);
}

template <class T>
INLINE vfloat& at_point(typename T::Slice* g, int p) {
  return g[p / T::POINTS][p % T::POINTS / LINE_POINTS][p % LINE_POINTS];
}

// What there is of a tap among a tile's points before they are transformed.
template <class T>
INLINE vfloat& at_tap(typename T::Slice* g, int tap, bool turned) {
  const int line = tap / 3 % 3, voxel = tap % 3;
  return turned ? g[tap / 9][voxel][line] : g[tap / 9][line][voxel];
}

// From one point's matrix to the next: a power of two apart they would share few cache sets.
INLINE int64_t matrix_pitch(const Convolution& a) { return a.I * a.O + CHANNELS; }

// matrices[point, O / COLUMNS, i, COLUMNS] <- G g of a block of CHANNELS i and COLUMNS o, so many as lie next to each other
template <class T, int VECTORS>
void transform_block(const ConvolutionMatrices& a, Columns<VECTORS>, int64_t block) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  const int64_t blocks = a.I / CHANNELS, first_i = block % blocks * CHANNELS, first_o = block / blocks * COLUMNS;
  for (int64_t i = first_i; i < first_i + CHANNELS; ++i) {
    for (int64_t o = first_o; o < first_o + COLUMNS; o += WIDTH) {
      typename T::Slice g[T::SLICES];
      for (int tap = 0; tap < T::TAPS; ++tap) {
        const float* w = a.weight + i * a.in_stride + (a.mirrored ? T::TAPS - 1 - tap : tap) * a.tap_stride;
        for (int lane = 0; lane < WIDTH; ++lane) at_tap<T>(g, tap, a.turned)[lane] = w[(o + lane) * a.out_stride];
      }
      const auto transform = [](auto& line) { transform_weight(line); };
      along_x<T>(g, transform);
      along_y<T>(g, transform);
      if constexpr (T::VOLUME) along_z<T>(g, transform);
      float* matrix = a.matrices + (o / COLUMNS * a.I + i) * COLUMNS + o % COLUMNS;
      for (int p = 0; p < T::SLICES * T::POINTS; ++p) store(matrix + p * matrix_pitch(a), at_point<T>(g, p));
    }
  }
}

template <class T, int VECTORS>
void make_matrices(ConvolutionMatrices& a, const T& tiles, Columns<VECTORS> columns) {
  a.count = T::SLICES * T::POINTS * matrix_pitch(a);
  a.columns = columns.COUNT;
  a.turned = tiles.turned;
  if (!a.matrices) return;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t block = 0; block < a.I / CHANNELS * (a.O / columns.COUNT); ++block) transform_block<T>(a, columns, block);
}

// out <- in times the matrices of one slice's points, for `count` tiles. A function of its own, so that what is around it
// leaves it its registers.
template <class T, int VECTORS>
__attribute__((noinline)) void multiply_points(const ConvolutionForward& a, Columns<VECTORS> columns,
                                               const float* matrices, Points<T, CHANNELS> in,
                                               Points<T, Columns<VECTORS>::COUNT> out, int64_t count,
                                               NextLines<T>& next) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  for (int p = 0; p < T::POINTS; ++p)
    for (int64_t o = 0; o < a.O; o += COLUMNS)
      for (int64_t t = 0; t < count; t += ROWS) {
        next.step();
        const float* matrix = matrices + p * matrix_pitch(a) + o * a.I;
        float* products = out.at(o, t) + p * COLUMNS;
        const auto multiply_part = [&](int64_t i, const auto& put) {
          const int blocks = int(minimum(SUMMED_CHANNELS, a.I - i) / CHANNELS);
          const PointRows<T> rows{in.at(i, t) + p * CHANNELS, in.block_stride(), blocks};
          multiply<ROWS>(rows, columns, matrix + i * COLUMNS, CHANNELS * COLUMNS, CHANNELS, nullptr, out.PITCH, put);
        };
        multiply_part(0, [&](int64_t at, vfloat sum) { store(products + at, sum); });
        for (int64_t i = SUMMED_CHANNELS; i < a.I; i += SUMMED_CHANNELS)
          multiply_part(i, [&](int64_t at, vfloat sum) { store(products + at, load(products + at) + sum); });
      }
}

// Of one thread, for a chunk of tiles.
template <class T, int64_t COLUMNS>
struct Scratch {
  using In = Points<T, CHANNELS>;
  using Out = Points<T, COLUMNS>;

  Buffer<float> in_values, out_values, zeros, sums;
  In in;
  Out out;

  Scratch(const Convolution& a, const T& tiles, int64_t chunk, int64_t count)
      : in_values(In::count(a.I, chunk)),
        out_values(Out::count(a.O, chunk)),
        zeros(tiles.W * tiles.voxel_step * a.I),
        sums(count),
        in{in_values, chunk},
        out{out_values, chunk} {}
};

template <class T, int VECTORS>
void forward(const ConvolutionForward& a, const T& tiles, Columns<VECTORS> columns) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  const int64_t I = a.I, O = a.O, chunk = tiles.balanced_chunk(a.threads), chunks = ceil_div(tiles.count, chunk);
  const int64_t run = maximum(1, minimum(RUN, chunks / (RUNS * a.threads)));
  const Finish finish(a.y, a.voxels() * O, a.negative_slope);
  Buffer<float> initial(O);
  if (a.bias) memcpy(initial, a.bias, O * sizeof(float));
  OutOfMemory out_of_memory;
#pragma omp parallel num_threads(a.threads)
  {
    OfThread<Scratch<T, COLUMNS>> scratch(out_of_memory, [&] {
      return Scratch<T, COLUMNS>(a, tiles, chunk, chunk * T::OUT_DEPTH * T::LINES * LINE_VOXELS * O);
    });
#pragma omp for schedule(dynamic, run)
    for (int64_t first = 0; first < tiles.count; first += chunk) {
      if (!scratch) continue;
      const Scratch<T, COLUMNS>& s = *scratch;
      const int64_t last = minimum(tiles.count, first + chunk), steps = ceil_div(last - first, ROWS) * (O / COLUMNS);
      NextLines<T> next(a, tiles, last, minimum(tiles.count, last + chunk), T::SLICES * T::POINTS * steps);
      for (int slice = 0; slice < T::SLICES; ++slice) {
        gather_input(tiles, slice, a.x, s.zeros, I, first, last, s.in);
        multiply_points(a, columns, a.matrices + slice * T::POINTS * matrix_pitch(a), s.in, s.out, last - first, next);
        scatter_result(tiles, slice, s.out, O, first, last, initial, s.sums, finish);
      }
    }
  }
  out_of_memory.rethrow();
}

// Runs work(tiles, columns) with those of the forward pass.
template <class Work>
void with_forward_tiles(const Convolution& a, const Work& work) {
  const bool tall = a.taps() * a.I >= TALL_PRODUCTS;
  with_columns(a.O, [&](auto columns) {
    with_tiles(a, FORWARD, tall, [&](const auto& tiles) { work(tiles, columns); });
  });
}

template <class T, int VECTORS>
void weight_gradient(const ConvolutionWeight& a, const T& tiles, Columns<VECTORS> columns) {
  constexpr int64_t COLUMNS = Columns<VECTORS>::COUNT;
  const int64_t I = a.I, O = a.O, chunk = tiles.chunk;
  const int64_t parts = ceil_div(tiles.count, SUM_TILES), slice_sums = T::POINTS * I * O;
  Buffer<double> total(T::SLICES * slice_sums, parts ? Fill::nothing : Fill::zeros);  // [point, I, O]
  OutOfMemory out_of_memory;
#pragma omp parallel num_threads(a.threads)
  {
    OfThread<Scratch<T, COLUMNS>> scratch(out_of_memory, [&] { return Scratch<T, COLUMNS>(a, tiles, chunk, slice_sums); });
#pragma omp for ordered schedule(dynamic, 1)
    for (int64_t task = 0; task < parts * T::SLICES; ++task) {
      if (!scratch) continue;
      const Scratch<T, COLUMNS>& s = *scratch;
      const int64_t part = task / T::SLICES, end = minimum(tiles.count, (part + 1) * SUM_TILES);
      const int slice = int(task % T::SLICES);
      memset(s.sums, 0, slice_sums * sizeof(float));
      for (int64_t first = part * SUM_TILES; first < end; first += chunk) {
        const int64_t last = minimum(end, first + chunk);
        gather_input(tiles, slice, a.x, s.zeros, I, first, last, s.in);
        gather_gradient(tiles, slice, a.grad_y, O, first, last, s.out);
        for (int p = 0; p < T::POINTS; ++p)
          for (int64_t o = 0; o < O; o += COLUMNS)
            for (int64_t i = 0; i < I; i += SUM_ROWS)
              add_products(columns, s.in.at(i, 0) + p * CHANNELS, s.in.PITCH, s.out.at(o, 0) + p * COLUMNS, s.out.PITCH,
                           last - first, s.sums + (p * I + i) * O + o, O);
      }
      // In the order of the tasks, so that any number of threads gives the same result.
#pragma omp ordered
      for (int64_t i = 0; i < slice_sums; ++i) {
        double& sum = total[slice * slice_sums + i];
        sum = part ? sum + s.sums[i] : s.sums[i];
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < I; ++i) {
      for (int64_t o = 0; o < O; o += WIDTH) {
        typename T::Slice g[T::SLICES];
        for (int p = 0; p < T::SLICES * T::POINTS; ++p)
          for (int lane = 0; lane < WIDTH; ++lane) at_point<T>(g, p)[lane] = float(total[(p * I + i) * O + o + lane]);
        const auto transform = [](auto& line) { transform_sums(line); };
        if constexpr (T::VOLUME) along_z<T>(g, transform);
        along_y<T>(g, transform);
        along_x<T>(g, transform);
        for (int tap = 0; tap < T::TAPS; ++tap) {
          float* w = a.grad_weight + i * a.in_stride + tap * a.tap_stride;
          for (int lane = 0; lane < WIDTH; ++lane) w[(o + lane) * a.out_stride] = at_tap<T>(g, tap, tiles.turned)[lane];
        }
      }
    }
  }
  out_of_memory.rethrow();
}

}  // namespace

void convolution_matrices(ConvolutionMatrices& a) {
  if (a.I % CHANNELS) return narrow_convolution_matrices(a);
  with_forward_tiles(a, [&](const auto& tiles, auto columns) { make_matrices(a, tiles, columns); });
}

void convolution_forward(const ConvolutionForward& a) {
  if (a.I % CHANNELS) return narrow_convolution_forward(a);
  with_forward_tiles(a, [&](const auto& tiles, auto columns) { forward(a, tiles, columns); });
}

void convolution_weight(const ConvolutionWeight& a) {
  if (a.I % CHANNELS) return narrow_convolution_weight(a);
  const bool tall = a.voxels() >= TALL_VOXELS;
  with_columns(a.O, [&](auto columns) {
    with_tiles(a, WEIGHT, tall, [&](const auto& tiles) { weight_gradient(a, tiles, columns); });
  });
}

}  // namespace semiseg::SEMISEG_LEVEL
