// mean[c] = sum_v weight[c, v] z[v] / total[c],  total[c] = sum_v weight[c, v];  0 where total[c] = 0
// grad_z[v] = sum_c weight[c, v] grad_mean[c] / total[c]
#include "class_products.h"
#include "kernels.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

struct MeanTile {
  // With the rows that ClassSums needs; row d of z is 1, so that the weights are summed like the channels.
  Buffer<float> weight, z;  // [C, pitch], [d + 1, pitch]
  ClassSums sums;

  MeanTile(int64_t C, int64_t d, int64_t pitch)
      : weight(ClassSums::class_rows(C) * pitch), z(ClassSums::channel_rows(d + 1) * pitch), sums(C, d + 1) {
    for (int64_t v = 0; v < pitch; ++v) z[d * pitch + v] = 1;
  }
};

}  // namespace

void masked_class_mean_forward(const MaskedClassMean& a) {
  const int64_t C = a.weight.channels, d = a.z.channels, sums = C * (d + 1);
  const Tiling tiling(a.z.batch, a.z.voxels, planned_rows(C, d), sums);
  Buffer<double> total(sums);
  for_chunks<MeanTile>(
      tiling, a.threads, total, sums, [&] { return MeanTile(C, d, tiling.pitch); },
      [&](MeanTile& tile, int64_t chunk, double* partial) {
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          load_tile(a.weight, span, tile.weight, tiling.pitch);
          load_tile(a.z, span, tile.z, tiling.pitch);
          tile.sums.add(tile.weight, tile.z, tiling.pitch, span.padded, tile.sums.prefetch(a.z, tiling.next(t)));
        }
        tile.sums.finish(partial);
      });
  for (int64_t c = 0; c < C; ++c) {
    const double* sum = total + c * (d + 1);
    a.total[c] = sum[d];
    for (int64_t j = 0; j < d; ++j) a.mean[c * d + j] = sum[d] == 0 ? 0 : float(sum[j] / sum[d]);
  }
}

void masked_class_mean_backward(const MaskedClassMean& a) {
  const int64_t C = a.weight.channels, d = a.grad_z.channels;
  Buffer<float> share(C * d);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t j = 0; j < d; ++j) share[c * d + j] = a.total[c] == 0 ? 0 : float(a.mean[c * d + j] / a.total[c]);
  const Panels panels = mixing_panels(share, C, d);
  const bool streaming = streams(a.grad_z);
  const Tiling tiling(a.grad_z.batch, a.grad_z.voxels, planned_rows(C, d), 0);
  for_chunks<MeanTile>(
      tiling, a.threads, nullptr, 0, [&] { return MeanTile(C, d, tiling.pitch); },
      [&](MeanTile& tile, int64_t chunk, double*) {
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          load_tile(a.weight, span, tile.weight, tiling.pitch);
          multiply(panels, tile.weight, tile.z, Plain{}, tiling.pitch, span.padded);
          store_tile(a.grad_z, span, tile.z, tiling.pitch, streaming);
        }
      });
}

}  // namespace semiseg::SEMISEG_LEVEL
