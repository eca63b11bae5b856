// logits[b, c] = sum_j matrix[b, c, j] x[b, j],  x[b, d] = 1, so that the matrix's last column is the bias
// grad_x[b, j] = sum_c matrix[b, c, j] grad_logits[b, c]
// grad_matrix[b, c, j] = sum over the voxels of image b of grad_logits[b, c] x[b, j]
#include "class_products.h"
#include "kernels.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

struct ClassifierTile {
  // With the rows that ClassSums needs; row d of x is 1.
  Buffer<float> logits, x;  // [C, pitch], [d + 1, pitch]
  Buffer<float> grad_x;     // [d, pitch]
  Panels matrix;            // of an image
  ClassSums sums;

  ClassifierTile(int64_t C, int64_t d, int64_t pitch, int64_t rows, int64_t depth)
      : logits(ClassSums::class_rows(C) * pitch), x(ClassSums::channel_rows(d + 1) * pitch), grad_x(d * pitch),
        matrix(rows, depth), sums(C, d + 1) {
    for (int64_t v = 0; v < pitch; ++v) x[d * pitch + v] = 1;
  }
};

// Runs work(image, first tile, tile after the last) on the tiles of every image that a chunk has a part in.
template <class Work>
void for_images(const Tiling& tiling, int64_t chunk, const Work& work) {
  const int64_t last = tiling.last_tile(chunk);
  for (int64_t first = tiling.first_tile(chunk); first < last;) {
    const int64_t image = first / tiling.tiles_per_image;
    const int64_t end = minimum(last, (image + 1) * tiling.tiles_per_image);
    work(image, first, end);
    first = end;
  }
}

}  // namespace

void linear_classifier_forward(const LinearClassifier& a) {
  const int64_t d = a.x.channels, columns = d + 1;
  const bool streaming = streams(a.logits);
  const Tiling tiling(a.x.batch, a.x.voxels, planned_rows(a.C, d), 0);
  const int64_t pitch = tiling.pitch;
  for_chunks<ClassifierTile>(
      tiling, a.threads, nullptr, 0, [&] { return ClassifierTile(a.C, d, pitch, a.C, columns); },
      [&](ClassifierTile& tile, int64_t chunk, double*) {
        for_images(tiling, chunk, [&](int64_t image, int64_t first, int64_t end) {
          tile.matrix.pack(a.matrix + image * a.C * columns, columns, 1);
          for (int64_t t = first; t < end; ++t) {
            const Span span = tiling.span(t);
            Prefetch(a.x, tiling.next(t), 1).step();
            load_tile(a.x, span, tile.x, pitch);
            multiply(tile.matrix, tile.x, tile.logits, Plain{}, pitch, span.padded);
            store_tile(a.logits, span, tile.logits, pitch, streaming);
          }
        });
      });
}

void linear_classifier_backward(const LinearClassifier& a) {
  const int64_t d = a.x.channels, columns = d + 1, sums = a.x.batch * a.C * columns;
  const bool streaming = streams(a.grad_x);
  const Tiling tiling(a.x.batch, a.x.voxels, planned_rows(a.C, d), sums);
  const int64_t pitch = tiling.pitch;
  Buffer<double> total(sums);
  for_chunks<ClassifierTile>(
      tiling, a.threads, total, sums, [&] { return ClassifierTile(a.C, d, pitch, d, a.C); },
      [&](ClassifierTile& tile, int64_t chunk, double* partial) {
        for_images(tiling, chunk, [&](int64_t image, int64_t first, int64_t end) {
          tile.matrix.pack(a.matrix + image * a.C * columns, 1, columns);
          for (int64_t t = first; t < end; ++t) {
            const Span span = tiling.span(t);
            load_tile(a.logits, span, tile.logits, pitch);
            load_tile(a.x, span, tile.x, pitch);
            multiply(tile.matrix, tile.logits, tile.grad_x, Plain{}, pitch, span.padded);
            store_tile(a.grad_x, span, tile.grad_x, pitch, streaming);
            tile.sums.add(tile.logits, tile.x, pitch, span.padded, tile.sums.prefetch(a.x, tiling.next(t)));
          }
          tile.sums.finish(partial + image * a.C * columns);
        });
      });
  for (int64_t i = 0; i < sums; ++i) a.grad_matrix[i] = float(total[i]);
}

}  // namespace semiseg::SEMISEG_LEVEL
