// kept[v] = label[v] where v lies in the largest component of its class, the first in scan order on ties; 0 elsewhere
//
// Union-find on runs, the neighbouring voxels of one class along the last axis. A parent never comes after its child:
// a component's root is its first run.
#include "kernels.h"
#include "tiles.h"

namespace semiseg::SEMISEG_LEVEL {

namespace {

constexpr int64_t MOST_CLASSES = 256;

struct Run {
  int32_t begin, end;  // voxels of the image
  int32_t parent;      // a run of the same component, itself at the root
  int32_t size;        // in voxels; at the root, in the end, of the component
};

INLINE bool is_foreground(uint8_t value, int64_t C) { return uint8_t(value - 1) < uint8_t(C - 1); }

INLINE int32_t count_runs(const uint8_t* line, int64_t X, int64_t C) {
  int32_t count = X > 0 && is_foreground(line[0], C);
  for (int64_t x = 1; x < X; ++x) count += line[x] != line[x - 1] && is_foreground(line[x], C);
  return count;
}

// How many of n bytes, from the first on, have this value.
INLINE int64_t count_equal(const uint8_t* bytes, int64_t n, uint8_t value) {
  constexpr int64_t WORD = sizeof(uint64_t);
  const uint64_t all_equal = 0x0101010101010101u * value;
  int64_t i = 0;
  for (; i + WORD <= n; i += WORD) {
    uint64_t word;
    memcpy(&word, bytes + i, WORD);
    if (word == all_equal) continue;
    const bool first_is_lowest = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
    return i + (first_is_lowest ? __builtin_ctzll(word ^ all_equal) : __builtin_clzll(word ^ all_equal)) / 8;
  }
  while (i < n && bytes[i] == value) ++i;
  return i;
}

struct Image {
  const uint8_t* label;  // [Z, Y, X]
  int64_t Y, X, C;
  const int64_t* first_run;  // [Z * Y + 1], counted from the first of the batch
  Run* runs;                 // of this image

  INLINE Run* runs_of(int64_t line) const { return runs + (first_run[line] - first_run[0]); }

  void find_runs(int64_t line) const {
    Run* run = runs_of(line);
    const int64_t last = (line + 1) * X;
    for (int64_t v = line * X; v < last;) {
      const uint8_t value = label[v];
      const int64_t n = count_equal(label + v, last - v, value);
      if (is_foreground(value, C)) {
        *run = {int32_t(v), int32_t(v + n), int32_t(run - runs), int32_t(n)};
        ++run;
      }
      v += n;
    }
  }

  INLINE Run* root(Run* run) const {
    while (runs + run->parent != run) {
      run->parent = runs[run->parent].parent;
      run = runs + run->parent;
    }
    return run;
  }

  void join(int64_t line, int64_t other) const {
    const int64_t shift = (line - other) * X;
    Run* first = runs_of(other);
    Run* const end = runs_of(other + 1);
    for (Run* run = runs_of(line); first < end && run < runs_of(line + 1); ++run) {
      while (first < end && first->end + shift < run->begin) ++first;
      Run* joined = root(run);
      for (Run* touching = first; touching < end && touching->begin + shift <= run->end; ++touching) {
        if (label[touching->begin] != label[run->begin]) continue;
        Run* const theirs = root(touching);
        Run* const earlier = theirs < joined ? theirs : joined;
        joined->parent = theirs->parent = int32_t(earlier - runs);
        joined = earlier;
      }
      run->parent = int32_t(joined - runs);
    }
  }

  // Joins a line's runs with those of the neighbouring lines before it that lie in [first, last).
  void join_earlier(int64_t line, int64_t first, int64_t last) const {
    const int64_t z = line / Y, y = line % Y;
    const auto join_if_there = [&](int64_t other) {
      if (other >= first && other < last) join(line, other);
    };
    if (z > 0)
      for (int64_t at = maximum(y - 1, int64_t(0)); at <= minimum(y + 1, Y - 1); ++at) join_if_there((z - 1) * Y + at);
    if (y > 0) join_if_there(line - 1);
  }

  // Makes every run point to its root, and finds the root of each class's largest component, -1 where there is none.
  void find_largest(int64_t num_runs, int32_t* largest) const {
    for (int64_t i = 0; i < num_runs; ++i) {
      runs[i].parent = runs[runs[i].parent].parent;
      if (runs[i].parent != i) runs[runs[i].parent].size += runs[i].size;
    }
    for (int64_t c = 0; c < MOST_CLASSES; ++c) largest[c] = -1;
    for (int64_t i = 0; i < num_runs; ++i) {
      int32_t& best = largest[label[runs[i].begin]];
      if (runs[i].parent == i && (best < 0 || runs[i].size > runs[best].size)) best = int32_t(i);
    }
  }

  void write(int64_t first_line, int64_t last_line, const int32_t* largest, uint8_t* kept) const {
    const int64_t voxels = (last_line - first_line) * X;
    if (voxels > 0) memset(kept + first_line * X, 0, voxels);  // of none the address may be null
    for (const Run* run = runs_of(first_line); run < runs_of(last_line); ++run) {
      const uint8_t value = label[run->begin];
      if (run->parent == largest[value]) memset(kept + run->begin, value, run->end - run->begin);
    }
  }
};

}  // namespace

void largest_components_forward(const LargestComponents& a) {
  const int64_t lines = a.Z * a.Y, voxels = lines * a.X;
  const int64_t slabs = maximum(int64_t(1), a.threads / maximum(a.B, int64_t(1)));  // of an image, for as many threads
  Buffer<int64_t> first_run(a.B * lines + 1);
#pragma omp parallel for num_threads(a.threads)
  for (int64_t line = 0; line < a.B * lines; ++line)
    first_run[line + 1] = count_runs(a.label + line * a.X, a.X, a.C);
  for (int64_t line = 0; line < a.B * lines; ++line) first_run[line + 1] += first_run[line];

  Buffer<Run> runs(first_run[a.B * lines]);
  Buffer<int32_t> largest(a.B * MOST_CLASSES);
  const auto image = [&](int64_t b) {
    const int64_t* const first = first_run + b * lines;
    return Image{a.label + b * voxels, a.Y, a.X, a.C, first, runs + *first};
  };
  const auto first_line = [&](int64_t slab) { return lines * slab / slabs; };

#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for collapse(2)
    for (int64_t b = 0; b < a.B; ++b) {
      for (int64_t slab = 0; slab < slabs; ++slab) {
        for (int64_t line = first_line(slab); line < first_line(slab + 1); ++line) {
          image(b).find_runs(line);
          image(b).join_earlier(line, first_line(slab), line);
        }
      }
    }
#pragma omp for
    for (int64_t b = 0; b < a.B; ++b) {
      for (int64_t slab = 1; slab < slabs; ++slab) {
        const int64_t first = first_line(slab), reaching = first + a.Y + 1;  // lines with neighbours before the slab
        for (int64_t line = first; line < minimum(reaching, first_line(slab + 1)); ++line)
          image(b).join_earlier(line, 0, first);
      }
      image(b).find_largest(first_run[(b + 1) * lines] - first_run[b * lines], largest + b * MOST_CLASSES);
    }
#pragma omp for collapse(2)
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t slab = 0; slab < slabs; ++slab)
        image(b).write(first_line(slab), first_line(slab + 1), largest + b * MOST_CLASSES, a.kept + b * voxels);
  }
}

}  // namespace semiseg::SEMISEG_LEVEL
