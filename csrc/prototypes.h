// What the prototype operations share: cosines of a tile's voxels with all prototypes, each class's best, the positive
// of InfoNCE and its softmax, and the gradient with respect to the embeddings.
//
//   unit(v) = v / max(|v|, EPSILON)
//   cosine[c, k] = unit(z) . unit(p[c, k])         best[c] = max_k cosine[c, k], reached first at winner[c]
#pragma once

#include "panels.h"
#include "prototype_similarity.h"

namespace semiseg::SEMISEG_LEVEL {

// Class and prototype counts, known to the compiler in the common cases.
template <int CLASSES, int PER_CLASS>
struct FixedShape {
  static constexpr int64_t C = CLASSES, K = PER_CLASS;
};
struct AnyShape {
  int64_t C, K;
};

template <class Run>
void with_shape(int64_t C, int64_t K, const Run& run) {
  if (C == 2 && K == 3) return run(FixedShape<2, 3>{});
  if (C == 4 && K == 3) return run(FixedShape<4, 3>{});
  run(AnyShape{C, K});
}

struct Prototypes {
  int64_t C, K, d, count;
  Buffer<float> unit;    // [C * K, d]
  Buffer<float> length;  // [C * K], max(|p|, EPSILON)

  Prototypes(const float* p, int64_t C, int64_t K, int64_t d)
      : C(C), K(K), d(d), count(C * K), unit(count * d), length(count) {
    for (int64_t i = 0; i < count; ++i) {
      double square = 0;
      for (int64_t j = 0; j < d; ++j) square += double(p[i * d + j]) * p[i * d + j];
      const double norm = __builtin_sqrt(square);
      length[i] = norm < EPSILON ? EPSILON : float(norm);
      for (int64_t j = 0; j < d; ++j) unit[i * d + j] = float(p[i * d + j] / (norm < EPSILON ? double(EPSILON) : norm));
    }
    // A maximum written as comparisons would pass a NaN by; in the class's first prototype it cannot.
    for (int64_t i = 0; i < count; ++i)
      if (length[i] != length[i]) unit[i / K * K * d] = length[i];
  }

  Panels for_cosines() const { return {unit, count, d, d, 1}; }
  Panels for_gradient() const { return {unit, d, count, 1, d}; }
};

// One tile's rows.
struct PrototypeTile {
  int64_t d, C, count, pitch;
  Buffer<float> z;             // [d, pitch]
  Buffer<float> cosine;        // [C * K, pitch]
  Buffer<float> best;          // [C, pitch]
  Buffer<int32_t> winner;      // [C, pitch]
  Buffer<float> length;        // [pitch], max(|z|, EPSILON)
  Buffer<float> inverse;       // [pitch], 1 / length
  Buffer<float> exponential;   // [C * K, pitch]; in backward the coefficient of each prototype
  Buffer<float> shrink;        // [pitch]; in backward the coefficient of z
  Buffer<int32_t> label;       // [pitch]
  Buffer<int32_t> region;      // [pitch]
  Buffer<float> weight;        // [pitch]
  Prefetch prefetch;

  PrototypeTile(const Prototypes& p, int64_t pitch)
      : d(p.d), C(p.C), count(p.count), pitch(pitch), z(d * pitch), cosine(count * pitch), best(C * pitch),
        winner(C * pitch), length(pitch), inverse(pitch), exponential(count * pitch), shrink(pitch), label(pitch),
        region(pitch), weight(pitch) {}

  // Reads the embeddings; leaves dot products with the unit prototypes in `cosine`, to be divided by `length`.
  void read_embeddings(const Voxels& embeddings, const Span& span, const Span& next, const Panels& panels) {
    load_tile(embeddings, span, z, pitch);
    prefetch = Prefetch(embeddings, next, 2 * span.padded / WIDTH);
    for (int64_t v = 0; v < span.padded; v += STEP) {
      prefetch.step();
      prefetch.step();
      vfloat low{}, high{};
      for (int64_t j = 0; j < d; ++j) {
        const vfloat a = load(z + j * pitch + v), b = load(z + j * pitch + v + WIDTH);
        low += a * a;
        high += b * b;
      }
      store_length(v, low);
      store_length(v + WIDTH, high);
    }
    multiply(panels, z, cosine, Plain{}, pitch, span.padded);
  }

  INLINE void store_length(int64_t v, vfloat square) {
    const vfloat norm = square_root(square);
    const vfloat clamped = norm < EPSILON ? broadcast(EPSILON) : norm;
    store(length + v, clamped);
    store(inverse + v, 1 / clamped);
  }
};

// Finishes the cosines of one vector of voxels and finds each class's best. Given the prototypes' lengths, also leaves
// the products z . p in tile.exponential.
template <class Shape>
INLINE void class_maxima(const Shape& shape, PrototypeTile& tile, int64_t v, const float* lengths = nullptr) {
  tile.prefetch.step();
  const vfloat length = load(tile.length + v), inverse = load(tile.inverse + v);
  for (int64_t c = 0; c < shape.C; ++c) {
    vfloat best{};
    vint winner{};
    for (int64_t k = 0; k < shape.K; ++k) {
      const int64_t i = c * shape.K + k;
      float* row = tile.cosine + i * tile.pitch + v;
      const vfloat dot = load(row), quotient = dot * inverse;
      const vfloat cosine = quotient + (dot - quotient * length) * inverse;  // as exact as a division
      store(row, cosine);
      if (lengths != nullptr) store(tile.exponential + i * tile.pitch + v, dot * lengths[i]);
      if (k == 0) {
        best = cosine;
      } else {
        winner = cosine > best ? broadcast(int32_t(k)) : winner;
        best = maximum(cosine, best);
      }
    }
    store(tile.best + c * tile.pitch + v, best);
    store(tile.winner + c * tile.pitch + v, winner);
  }
}

struct Winner {
  vfloat cosine;
  vint flat;  // class * K + prototype
};

template <class Shape>
INLINE Winner best_of_all(const Shape& shape, const PrototypeTile& tile, int64_t v) {
  Winner result{load(tile.best + v), load(tile.winner + v)};
  for (int64_t c = 1; c < shape.C; ++c) {
    const vfloat best = load(tile.best + c * tile.pitch + v);
    const vint flat = load(tile.winner + c * tile.pitch + v) + int32_t(c * shape.K);
    result.flat = best > result.cosine ? flat : result.flat;
    result.cosine = maximum(best, result.cosine);
  }
  return result;
}

template <class Shape>
INLINE Winner best_of_label(const Shape& shape, const PrototypeTile& tile, int64_t v) {
  const vint label = load(tile.label + v);
  Winner result{load(tile.best + v), load(tile.winner + v)};
  for (int64_t c = 1; c < shape.C; ++c) {
    const vint here = label == int32_t(c);
    result.flat = here ? load(tile.winner + c * tile.pitch + v) + int32_t(c * shape.K) : result.flat;
    result.cosine = here ? load(tile.best + c * tile.pitch + v) : result.cosine;
  }
  return result;
}

struct InfoNCE {
  float inverse_temperature;
  bool normalize;
  bool positive_of_label;
  int32_t ignore_prototype;
};

struct InfoNCEVoxels {
  vfloat loss, sum;  // sum: of the exponentials, relative to the largest logit's
  vint positive, kept;
};

// loss = logsumexp_ck(logit / temperature) - logit[positive] / temperature; leaves exp((logit - max) / temperature) in
// tile.exponential. logit = cosine, or z . p where not normalised (expected in tile.exponential).
template <class Shape>
INLINE InfoNCEVoxels info_nce_voxels(const Shape& shape, const InfoNCE& a, PrototypeTile& tile, const Winner& nearest,
                                     int64_t v) {
  const int64_t count = shape.C * shape.K, pitch = tile.pitch;
  const Winner positive = a.positive_of_label ? best_of_label(shape, tile, v) : nearest;
  vfloat top = nearest.cosine, of_positive = positive.cosine;
  const float* logits = tile.cosine;
  if (!a.normalize) {
    logits = tile.exponential;
    for (int64_t i = 0; i < count; ++i) {
      const vfloat logit = load(logits + i * pitch + v);
      top = i == 0 ? logit : maximum(logit, top);
      of_positive = positive.flat == int32_t(i) ? logit : of_positive;
    }
  }
  vfloat sum{};
  for (int64_t i = 0; i < count; ++i) {
    const vfloat e = exp_nonpositive((load(logits + i * pitch + v) - top) * a.inverse_temperature);
    store(tile.exponential + i * pitch + v, e);
    sum += e;
  }
  const vint kept = (load(tile.label + v) >= 0) & (positive.flat != a.ignore_prototype);
  return {log_positive(sum) + (top - of_positive) * a.inverse_temperature, sum, positive.flat, kept};
}

// Turns the exponentials of InfoNCE into the loss's derivative by the logits: scale * (softmax - [positive]).
template <class Shape>
INLINE void info_nce_gradient(const Shape& shape, const InfoNCE& a, PrototypeTile& tile, const InfoNCEVoxels& x,
                              vfloat scale, int64_t v) {
  scale = x.kept ? scale * a.inverse_temperature : vfloat{};
  const vfloat normalizer = scale / x.sum;
  for (int64_t i = 0; i < shape.C * shape.K; ++i) {
    float* row = tile.exponential + i * tile.pitch + v;
    vfloat derivative = load(row) * normalizer;
    derivative = x.positive == int32_t(i) ? derivative - scale : derivative;
    store(row, x.kept ? derivative : vfloat{});
  }
}

// From derivatives by the cosines and (where `raw`) by z . p to the coefficients of the gradient with respect to z,
//   (sum_i coefficient[i] unit(p[i]) + shrink z) / length,
// by d cosine[i] / dz = (unit(p[i]) - cosine[i] unit(z)) / |z|; cosines of embeddings shorter than EPSILON are constant.
// tile.exponential holds d loss / d logit of InfoNCE; by_class(c) is d loss / d best[c].
template <class Shape, class ByClass>
INLINE void gradient_coefficients(const Shape& shape, bool raw, const Prototypes& prototypes, PrototypeTile& tile,
                                  const ByClass& by_class, int64_t v) {
  const int64_t pitch = tile.pitch;
  const vfloat length = load(tile.length + v);
  const vint constant = length == EPSILON;
  vfloat along{};  // sum_i derivative[i] cosine[i]
  for (int64_t c = 0; c < shape.C; ++c) {
    const vfloat of_class = constant ? vfloat{} : by_class(c);
    const vint winner = load(tile.winner + c * pitch + v);
    for (int64_t k = 0; k < shape.K; ++k) {
      const int64_t i = c * shape.K + k;
      float* row = tile.exponential + i * pitch + v;
      const vfloat of_logit = load(row);
      const vfloat chosen = winner == int32_t(k) ? of_class : vfloat{};
      const vfloat by_cosine = raw ? chosen : chosen + (constant ? vfloat{} : of_logit);
      along += by_cosine * load(tile.cosine + i * pitch + v);
      store(row, raw ? by_cosine + of_logit * length * prototypes.length[i] : by_cosine);
    }
  }
  store(tile.shrink + v, -along * load(tile.inverse + v));
}

// Overwrites the tile's embeddings with the gradient and stores it.
INLINE void write_gradient(const Panels& panels, PrototypeTile& tile, const Voxels& gradient, const Span& span,
                           bool streaming) {
  multiply(panels, tile.exponential, tile.z, Affine{tile.shrink, tile.inverse}, tile.pitch, span.padded);
  store_tile(gradient, span, tile.z, tile.pitch, streaming);
}

}  // namespace semiseg::SEMISEG_LEVEL
