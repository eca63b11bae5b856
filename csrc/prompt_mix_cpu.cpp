// prompt[e] = sum_c share[c] text[c, e],  share = softmax(logits)
// d prompt / d logits: grad_logits[c] = share[c] (g[c] - sum_i share[i] g[i]),  g[c] = sum_e text[c, e] grad_prompt[e]
// d prompt / d text:   grad_text[c, e] = sum over the voxels of share[c] grad_prompt[e]
#include "class_losses.h"
#include "class_products.h"
#include "kernels.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

struct Classes {
  int64_t C;
};

struct PromptTile {
  Buffer<float> logits, by_share;  // [C, pitch]
  Buffer<float> share, prompt;     // [C, pitch], [E, pitch], with the rows that ClassSums needs
  ClassSums by_text;

  PromptTile(int64_t C, int64_t E, int64_t pitch)
      : logits(C * pitch), by_share(C * pitch), share(ClassSums::class_rows(C) * pitch),
        prompt(ClassSums::channel_rows(E) * pitch), by_text(C, E) {}

  void read_shares(const Voxels& from, const Span& span, int64_t pitch) {
    const Classes classes{from.channels};
    load_tile(from, span, logits, pitch);
    for (int64_t v = 0; v < span.padded; v += WIDTH) {
      softmax_exponentials(classes, logits + v, share + v, pitch, 1.f);
      const vfloat inverse = 1 / sum_of_classes(classes, share + v, pitch);
      for (int64_t c = 0; c < classes.C; ++c) store(share + c * pitch + v, load(share + c * pitch + v) * inverse);
    }
  }
};

Tiling tiling_of(const PromptMix& a, int64_t sums) {
  return {a.logits.batch, a.logits.voxels, planned_rows(3 * a.logits.channels, a.E), sums};
}

// Overwrites the derivatives by the shares with those by the logits.
void through_softmax(const float* share, float* gradient, int64_t C, int64_t pitch, int64_t padded) {
  for (int64_t v = 0; v < padded; v += WIDTH) {
    vfloat mean{};
    for (int64_t c = 0; c < C; ++c) mean += load(share + c * pitch + v) * load(gradient + c * pitch + v);
    for (int64_t c = 0; c < C; ++c) {
      float* row = gradient + c * pitch + v;
      store(row, load(share + c * pitch + v) * (load(row) - mean));
    }
  }
}

}  // namespace

void prompt_mix_forward(const PromptMix& a) {
  const int64_t C = a.logits.channels;
  const Panels panels = mixing_panels(a.text, C, a.E);
  const bool streaming = streams(a.prompt);
  const Tiling tiling = tiling_of(a, 0);
  const int64_t pitch = tiling.pitch;
  for_chunks<PromptTile>(
      tiling, a.threads, nullptr, 0, [&] { return PromptTile(C, a.E, pitch); },
      [&](PromptTile& tile, int64_t chunk, double*) {
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_shares(a.logits, span, pitch);
          multiply(panels, tile.share, tile.prompt, Plain{}, pitch, span.padded);
          store_tile(a.prompt, span, tile.prompt, pitch, streaming);
        }
      });
}

void prompt_mix_backward(const PromptMix& a) {
  const int64_t C = a.logits.channels, sums = C * a.E;
  const Panels panels(a.text, C, a.E, a.E, 1);
  const Tiling tiling = tiling_of(a, sums);
  const int64_t pitch = tiling.pitch;
  Buffer<double> total(sums);
  for_chunks<PromptTile>(
      tiling, a.threads, total, sums, [&] { return PromptTile(C, a.E, pitch); },
      [&](PromptTile& tile, int64_t chunk, double* partial) {
        for (int64_t t = tiling.first_tile(chunk); t < tiling.last_tile(chunk); ++t) {
          const Span span = tiling.span(t);
          tile.read_shares(a.logits, span, pitch);
          load_tile(a.prompt, span, tile.prompt, pitch);
          multiply(panels, tile.prompt, tile.by_share, Plain{}, pitch, span.padded);
          through_softmax(tile.share, tile.by_share, C, pitch, span.padded);
          store_tile(a.grad_logits, span, tile.by_share, pitch, false);
          const Prefetch next = tile.by_text.prefetch(a.prompt, tiling.next(t));
          tile.by_text.add(tile.share, tile.prompt, pitch, span.padded, next);
        }
        tile.by_text.finish(partial);
      });
  for (int64_t i = 0; i < sums; ++i) a.grad_text[i] = float(total[i]);
}

}  // namespace semiseg::SEMISEG_LEVEL
