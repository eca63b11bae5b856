// h = scale (x - mean) + bias,  y = h where h > 0, negative_slope h elsewhere;  scale = weight / sqrt(variance + epsilon)
// g = grad_y where h > 0, negative_slope grad_y elsewhere
// grad_x = scale (g - offset - tilt (x - mean)),  with the sums over all N voxels of a channel
// offset = sum g / N,  tilt = sum g (x - mean) / (N (variance + epsilon))
#include "batch_norm_relu_channels.h"
#include "kernels.h"
#include "tiles.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

constexpr int64_t VECTORS = 4;  // whose sums stay in registers
constexpr int64_t BLOCK = VECTORS * WIDTH;

int64_t common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y) {
    const int64_t remainder = x % y;
    x = y;
    y = remainder;
  }
  return a / x * b;
}

struct Piece {  // of a tensor's elements, as they lie in memory
  int64_t first, n;
  int64_t channel;  // of the first
};

// A dense tensor cut into pieces. Channels-last, the channels recur with a period that whole blocks of vectors fill;
// otherwise a piece lies within one channel of one image.
struct Pieces {
  static constexpr int64_t LENGTH = 8192;  // elements, which stay in the first-level cache
  static constexpr int64_t MOST_CHUNKS = 64;

  int64_t channels, period, length, row, pieces_per_row, pieces, chunks;
  int64_t channels_in_piece;

  explicit Pieces(const Voxels& x) : channels(x.channels) {
    const bool channels_last = x.voxel_stride != 1 || x.channels == 1;
    channels_in_piece = channels_last ? channels : 1;
    period = common_multiple(channels_in_piece, BLOCK);
    length = maximum(period, LENGTH / period * period);
    row = channels_last ? x.batch * x.voxels * channels : x.voxels;
    pieces_per_row = ceil_div(row, length);
    pieces = pieces_per_row * (channels_last ? 1 : x.batch * channels);
    chunks = minimum(pieces, MOST_CHUNKS);
  }

  Piece piece(int64_t index) const {
    const int64_t row_index = index / pieces_per_row, within = (index - row_index * pieces_per_row) * length;
    return {row_index * row + within, minimum(length, row - within), channels_in_piece == 1 ? row_index % channels : 0};
  }

  // The first piece of a chunk; the last is that of the next one.
  int64_t first(int64_t chunk) const { return pieces * chunk / chunks; }
};

// A parameter of every channel, repeated along the period of a piece's elements.
struct Parameter {
  const float* of_channel;
  const Pieces& pieces;
  Buffer<float> along;

  Parameter(const float* of_channel, const Pieces& pieces)
      : of_channel(of_channel), pieces(pieces), along(pieces.period) {
    if (pieces.channels_in_piece > 1) spread(of_channel);
  }

  void enter(const Piece& piece) {
    if (pieces.channels_in_piece == 1) spread(of_channel + piece.channel);
  }

  void spread(const float* values) {
    for (int64_t i = 0; i < pieces.period; ++i) along[i] = values[i % pieces.channels_in_piece];
  }

  INLINE vfloat operator[](int64_t at) const { return load(along + at); }
};

template <class T>
INLINE vfloat load_up_to(int64_t n, const T* p) {
  return n == WIDTH ? load(p) : load_first(p, n);
}

// Sums [SUMS, channels of the piece] of what term(i, position in the period, n, terms) gives for n elements from i on.
template <int SUMS, class Term>
INLINE void sum_piece(const Pieces& pieces, const Piece& piece, double* sums, const Term& term) {
  const int64_t period = pieces.period, channels = pieces.channels_in_piece, whole = piece.n / period * period;
  float lanes[SUMS][BLOCK];
  for (int64_t i = 0; i < SUMS * channels; ++i) sums[i] = 0;
  for (int64_t at = 0; at < period; at += BLOCK) {
    vfloat sum[SUMS][VECTORS] = {};
    for (int64_t i = at; i < whole; i += period) {
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; ++k) {
        vfloat terms[SUMS];
        term(i + k * WIDTH, at + k * WIDTH, WIDTH, terms);
        for (int s = 0; s < SUMS; ++s) sum[s][k] += terms[s];
      }
    }
    for (int s = 0; s < SUMS; ++s)
      for (int k = 0; k < VECTORS; ++k) store(lanes[s] + k * WIDTH, sum[s][k]);
    int64_t channel = at % channels;
    for (int64_t i = 0; i < BLOCK; ++i) {
      for (int s = 0; s < SUMS; ++s) sums[s * channels + channel] += lanes[s][i];
      channel = channel + 1 == channels ? 0 : channel + 1;
    }
  }
  for (int64_t i = whole; i < piece.n; i += WIDTH) {
    const int64_t n = minimum(int64_t(WIDTH), piece.n - i);
    vfloat terms[SUMS];
    term(i, i - whole, n, terms);
    for (int s = 0; s < SUMS; ++s) {
      store(lanes[s], terms[s]);
      for (int64_t lane = 0; lane < n; ++lane) sums[s * channels + (i + lane) % channels] += lanes[s][lane];
    }
  }
}

struct Moments {  // of some values of one channel
  double count, mean, squares;  // squares: the sum of (value - mean)^2

  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, step = other.mean - mean;
    squares += other.squares + step * step * count * other.count / total;
    mean += step * other.count / total;
    count = total;
  }
};

struct StatisticsScratch {
  Buffer<float> centre;
  Buffer<double> sum, distances;  // and their squares
  Parameter about;

  explicit StatisticsScratch(const Pieces& pieces)
      : centre(pieces.channels_in_piece),
        sum(pieces.channels_in_piece),
        distances(2 * pieces.channels_in_piece),
        about(centre, pieces) {}
};

template <class T>
void statistics(const BatchNormReLUStatistics& a) {
  const Pieces pieces(a.x);
  const int64_t C = pieces.channels, in_piece = pieces.channels_in_piece;
  Buffer<Moments> partials(pieces.chunks * C);
  const auto make_scratch = [&] { return StatisticsScratch(pieces); };
  for_chunks<StatisticsScratch>(pieces.chunks, a.threads, make_scratch, [&](StatisticsScratch& scratch, int64_t chunk) {
    float* const centre = scratch.centre;
    double *const sum = scratch.sum, *const distances = scratch.distances;
    Parameter& about = scratch.about;
    for (int64_t p = pieces.first(chunk); p < pieces.first(chunk + 1); ++p) {
      const Piece piece = pieces.piece(p);
      const T* x = static_cast<const T*>(a.x.data) + piece.first;
      const double count = double(piece.n / in_piece);
      sum_piece<1>(pieces, piece, sum,
                   [x](int64_t i, int64_t, int64_t n, vfloat* terms) { terms[0] = load_up_to(n, x + i); });
      // Sums of distances from the piece's approximate mean; from zero they would lose the digits of a large mean.
      for (int64_t c = 0; c < in_piece; ++c) centre[c] = float(sum[c] / count);
      about.spread(centre);
      sum_piece<2>(pieces, piece, distances, [x, &about](int64_t i, int64_t at, int64_t n, vfloat* terms) {
        terms[0] = load_up_to(n, x + i) - about[at];
        terms[1] = terms[0] * terms[0];
      });
      for (int64_t c = 0; c < in_piece; ++c) {
        const double distance = distances[c] / count, squares = distances[in_piece + c] - count * distance * distance;
        partials[chunk * C + piece.channel + c].add({count, centre[c] + distance, squares});
      }
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    Moments total{};
    for (int64_t chunk = 0; chunk < pieces.chunks; ++chunk) total.add(partials[chunk * C + c]);
    a.mean[c] = total.mean;
    a.variance[c] = total.squares < 0 ? 0 : total.squares / total.count;
  }
}

// Normalisation and activation of a piece.
struct Normalised {
  Parameter mean, scale, bias;
  float negative_slope;
  vint sloped;  // all bits where the slope is not 0

  Normalised(const BatchNormReLU& a, const Pieces& pieces)
      : mean(a.mean, pieces),
        scale(a.scale, pieces),
        bias(a.bias, pieces),
        negative_slope(a.negative_slope),
        sloped(broadcast(a.negative_slope) != 0) {}

  void enter(const Piece& piece) {
    mean.enter(piece);
    scale.enter(piece);
    bias.enter(piece);
  }

  INLINE vfloat centred(vfloat x, int64_t at) const { return x - mean[at]; }
  INLINE vfloat before_activation(vfloat centred, int64_t at) const { return scale[at] * centred + bias[at]; }
  INLINE vfloat activated(vfloat h) const { return h > 0 ? h : negative_slope * h; }
  // 0 times an infinity would be NaN.
  INLINE vfloat gradient(vfloat h, vfloat grad_y) const {
    return h > 0 ? grad_y : bit_cast<vfloat>(bit_cast<vint>(negative_slope * grad_y) & sloped);
  }
};

// Writes result(i, position in the period, n) for every n elements from i on.
template <class T, class Result>
INLINE void write_piece(const Pieces& pieces, const Piece& piece, T* out, bool streaming, const Result& result) {
  const int64_t period = pieces.period, whole = piece.n / period * period;
  for (int64_t first = 0; first < whole; first += period) {
    for (int64_t at = 0; at < period; at += WIDTH) {
      const vfloat value = result(first + at, at, WIDTH);
      if (streaming) stream(out + first + at, value);
      else store(out + first + at, value);
    }
  }
  for (int64_t i = whole; i < piece.n; i += WIDTH) {
    const int64_t n = minimum(int64_t(WIDTH), piece.n - i);
    store_first(out + i, result(i, i - whole, n), n);
  }
}

// Streaming stores need vectors at multiples of their size.
bool streams_pieces(const Voxels& x, const Pieces& pieces) { return streams(x) && pieces.row % WIDTH == 0; }

template <class T>
void forward(const BatchNormReLUForward& a) {
  const Pieces pieces(a.x);
  const bool streaming = streams_pieces(a.y, pieces);
  const auto make_scratch = [&] { return Normalised(a, pieces); };
  for_chunks<Normalised>(pieces.chunks, a.threads, make_scratch, [&](Normalised& normalised, int64_t chunk) {
    for (int64_t p = pieces.first(chunk); p < pieces.first(chunk + 1); ++p) {
      const Piece piece = pieces.piece(p);
      normalised.enter(piece);
      const T* x = static_cast<const T*>(a.x.data) + piece.first;
      T* y = static_cast<T*>(a.y.data) + piece.first;
      write_piece(pieces, piece, y, streaming, [&, x](int64_t i, int64_t at, int64_t n) {
        const vfloat h = normalised.before_activation(normalised.centred(load_up_to(n, x + i), at), at);
        return normalised.activated(h);
      });
    }
  });
}

struct SumsScratch {
  Normalised normalised;
  Buffer<double> of_piece;
};

template <class T>
void sums(const BatchNormReLUSums& a) {
  const Pieces pieces(a.x);
  const int64_t C = pieces.channels, in_piece = pieces.channels_in_piece;
  Buffer<double> partials(pieces.chunks * 2 * C);
  const auto make_scratch = [&] { return SumsScratch{Normalised(a, pieces), Buffer<double>(2 * in_piece)}; };
  for_chunks<SumsScratch>(pieces.chunks, a.threads, make_scratch, [&](SumsScratch& scratch, int64_t chunk) {
    Normalised& normalised = scratch.normalised;
    double* const of_piece = scratch.of_piece;
    for (int64_t p = pieces.first(chunk); p < pieces.first(chunk + 1); ++p) {
      const Piece piece = pieces.piece(p);
      normalised.enter(piece);
      const T* x = static_cast<const T*>(a.x.data) + piece.first;
      const T* grad_y = static_cast<const T*>(a.grad_y.data) + piece.first;
      sum_piece<2>(pieces, piece, of_piece, [&, x, grad_y](int64_t i, int64_t at, int64_t n, vfloat* terms) {
        const vfloat centred = normalised.centred(load_up_to(n, x + i), at);
        terms[0] = normalised.gradient(normalised.before_activation(centred, at), load_up_to(n, grad_y + i));
        terms[1] = terms[0] * centred;
      });
      for (int64_t s = 0; s < 2; ++s)
        for (int64_t c = 0; c < in_piece; ++c)
          partials[(chunk * 2 + s) * C + piece.channel + c] += of_piece[s * in_piece + c];
    }
  });
  for (int64_t i = 0; i < 2 * C; ++i) {
    a.sums[i] = 0;
    for (int64_t chunk = 0; chunk < pieces.chunks; ++chunk) a.sums[i] += partials[chunk * 2 * C + i];
  }
}

struct BackwardScratch {
  Normalised normalised;
  Parameter offset, tilt;
};

template <class T>
void backward(const BatchNormReLUBackward& a) {
  const Pieces pieces(a.x);
  const bool streaming = streams_pieces(a.grad_x, pieces);
  const auto make_scratch = [&] {
    return BackwardScratch{Normalised(a, pieces), Parameter(a.offset, pieces), Parameter(a.tilt, pieces)};
  };
  for_chunks<BackwardScratch>(pieces.chunks, a.threads, make_scratch, [&](BackwardScratch& scratch, int64_t chunk) {
    Normalised& normalised = scratch.normalised;
    Parameter &offset = scratch.offset, &tilt = scratch.tilt;
    for (int64_t p = pieces.first(chunk); p < pieces.first(chunk + 1); ++p) {
      const Piece piece = pieces.piece(p);
      normalised.enter(piece);
      offset.enter(piece);
      tilt.enter(piece);
      const T* x = static_cast<const T*>(a.x.data) + piece.first;
      const T* grad_y = static_cast<const T*>(a.grad_y.data) + piece.first;
      T* grad_x = static_cast<T*>(a.grad_x.data) + piece.first;
      write_piece(pieces, piece, grad_x, streaming, [&, x, grad_y](int64_t i, int64_t at, int64_t n) {
        const vfloat centred = normalised.centred(load_up_to(n, x + i), at);
        const vfloat g = normalised.gradient(normalised.before_activation(centred, at), load_up_to(n, grad_y + i));
        return normalised.scale[at] * (g - offset[at] - tilt[at] * centred);
      });
    }
  });
}

template <class Operation>
void compute_channels(const Operation& a) {
  for (int64_t c = 0; c < a.channels; ++c) compute_channel(a, c);
}

}  // namespace

#define SEMISEG_FOR_TYPE(function, a)                                    \
  switch ((a).x.type) {                                                  \
    case DataType::bfloat16: return function<bfloat16>(a);               \
    case DataType::float16: return function<float16>(a);                 \
    default: return function<float>(a);                                  \
  }

void batch_norm_relu_statistics(const BatchNormReLUStatistics& a) { SEMISEG_FOR_TYPE(statistics, a) }
void batch_norm_relu_parameters(const BatchNormReLUParameters& a) { compute_channels(a); }
void batch_norm_relu_forward(const BatchNormReLUForward& a) { SEMISEG_FOR_TYPE(forward, a) }
void batch_norm_relu_sums(const BatchNormReLUSums& a) { SEMISEG_FOR_TYPE(sums, a) }
void batch_norm_relu_correction(const BatchNormReLUCorrection& a) { compute_channels(a); }
void batch_norm_relu_backward(const BatchNormReLUBackward& a) { SEMISEG_FOR_TYPE(backward, a) }

#undef SEMISEG_FOR_TYPE

}  // namespace semiseg::SEMISEG_LEVEL
