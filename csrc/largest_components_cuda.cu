// kept[v] = label[v] where v lies in the largest component of its class, the first in scan order on ties; 0 elsewhere
//
// Union-find on voxels. A parent never comes after its child: a component's root is its first voxel, in whatever order
// the threads join them.
#include "device_sums.cuh"
#include "kernels.cuh"

namespace semiseg::cuda {

namespace {

struct Components {
  int64_t tiles_per_image, tiles;
  unsigned* parent;             // [B, Z, Y, X], a voxel of the same component, itself at the root
  unsigned* size;               // [B, Z, Y, X], of the component, at its root
  unsigned long long* largest;  // [B, C], see `rank`

  Components(Arena& arena, const LargestComponents& a)
      : tiles_per_image(ceil_div(a.Z * a.Y * a.X, THREADS)), tiles(a.B * tiles_per_image),
        parent(arena.take<unsigned>(a.B * a.Z * a.Y * a.X)), size(arena.take<unsigned>(a.B * a.Z * a.Y * a.X)),
        largest(arena.take<unsigned long long>(a.B * a.C)) {}
};

// Larger components rank higher, of two of one size the earlier.
__device__ __forceinline__ unsigned long long rank(unsigned size, unsigned root) {
  return (unsigned long long)(size) << 32 | ~root;
}
__device__ __forceinline__ unsigned root_of(unsigned long long rank) { return ~unsigned(rank); }

struct Image {
  const uint8_t* label;
  unsigned* parent;
  unsigned* size;
  unsigned long long* largest;  // [C]
  uint8_t* kept;

  __device__ Image(const LargestComponents& a, const Components& components, int64_t image) {
    const int64_t first = image * a.Z * a.Y * a.X;
    label = a.label + first;
    parent = components.parent + first;
    size = components.size + first;
    largest = components.largest + image * a.C;
    kept = a.kept + first;
  }

  __device__ __forceinline__ unsigned root(unsigned v) const {
    for (unsigned next = __ldcg(parent + v); next != v; next = __ldcg(parent + v)) v = next;
    return v;
  }

  __device__ void unite(unsigned v, unsigned w) const {
    for (;;) {
      v = root(v);
      w = root(w);
      if (v == w) return;
      const unsigned earlier = min(v, w), later = max(v, w);
      const unsigned before = atomicMin(parent + later, earlier);
      if (before == later) return;
      // Another thread gave it a parent meanwhile, which now has to be joined in its place.
      v = earlier;
      w = before;
    }
  }
};

// Runs run(image, voxel, class) in all threads of a block for every tile; the class is 0 in the background, and also
// beyond the image.
template <class Run>
__device__ __forceinline__ void for_voxels(const LargestComponents& a, const Components& components, const Run& run) {
  for (int64_t t = blockIdx.x; t < components.tiles; t += gridDim.x) {
    const int64_t index = t / components.tiles_per_image;
    const Image image(a, components, index);
    const int64_t v = (t - index * components.tiles_per_image) * THREADS + threadIdx.x;
    const int value = v < a.Z * a.Y * a.X ? image.label[v] : 0;
    run(image, unsigned(v), value < a.C ? value : 0);
  }
}

// A voxel's parent is the first of its run, the neighbouring voxels of its class along the last axis, in its warp.
__global__ void __launch_bounds__(THREADS) start(LargestComponents a, Components components) {
  for_grid(a.B * a.C, [&](int64_t i) { components.largest[i] = 0; });
  for_voxels(a, components, [&](const Image& image, unsigned v, int value) {
    const unsigned lane = threadIdx.x % WARP;
    const int left = __shfl_up_sync(ALL_LANES, value, 1);
    const bool starts = lane == 0 || left != value || v % unsigned(a.X) == 0;
    const unsigned starts_so_far = __ballot_sync(ALL_LANES, starts) & (ALL_LANES >> (WARP - 1 - lane));
    if (value == 0) return;
    image.parent[v] = v - (lane - (WARP - 1 - __clz(int(starts_so_far))));
    image.size[v] = 0;
  });
}

// Within a run its voxels' neighbours overlap: only those are joined that no voxel before has met.
__global__ void __launch_bounds__(THREADS) join(LargestComponents a, Components components) {
  for_voxels(a, components, [&](const Image& image, unsigned v, int value) {
    if (value == 0) return;
    const unsigned X = unsigned(a.X), Y = unsigned(a.Y), line = v / X, x = v - line * X, z = line / Y, y = line - z * Y;
    const bool continues = x > 0 && image.label[v - 1] == value;
    if (continues && threadIdx.x % WARP == 0) image.unite(v, v - 1);
    const auto join_line = [&](unsigned opposite) {
      const bool touches = image.label[opposite] == value;
      if (touches && !continues) image.unite(v, opposite);
      if (touches) return;
      if (!continues && x > 0 && image.label[opposite - 1] == value) image.unite(v, opposite - 1);
      if (x + 1 < X && image.label[opposite + 1] == value) image.unite(v, opposite + 1);
    };
    if (y > 0) join_line(v - X);
    if (z == 0) return;
    const unsigned before = v - X * Y;
    if (y > 0) join_line(before - X);
    join_line(before);
    if (y + 1 < Y) join_line(before + X);
  });
}

__global__ void __launch_bounds__(THREADS) measure(LargestComponents a, Components components) {
  for_voxels(a, components, [&](const Image& image, unsigned v, int value) {
    const unsigned root = value == 0 ? ~0u : image.root(v);
    const unsigned same = __match_any_sync(ALL_LANES, root);
    if (value == 0) return;
    image.parent[v] = root;
    if (threadIdx.x % WARP == unsigned(__ffs(int(same)) - 1)) atomicAdd(image.size + root, unsigned(__popc(same)));
  });
}

__global__ void __launch_bounds__(THREADS) find_largest(LargestComponents a, Components components) {
  for_voxels(a, components, [&](const Image& image, unsigned v, int value) {
    if (value == 0 || image.parent[v] != v) return;
    const unsigned long long mine = rank(image.size[v], v);
    if (mine > __ldcg(image.largest + value)) atomicMax(image.largest + value, mine);
  });
}

__global__ void __launch_bounds__(THREADS) write(LargestComponents a, Components components) {
  for_voxels(a, components, [&](const Image& image, unsigned v, int value) {
    if (v >= a.Z * a.Y * a.X) return;
    const bool keeps = value != 0 && image.parent[v] == root_of(image.largest[value]);
    image.kept[v] = uint8_t(keeps ? value : 0);
  });
}

}  // namespace

int64_t largest_components_forward(const LargestComponents& a, const Device& device) {
  Arena workspace{static_cast<char*>(device.workspace)};
  const Components components(workspace, a);
  if (device.workspace == nullptr) return workspace.bytes;
  const dim3 blocks(blocks_without_sums(components.tiles, device));
  for (const auto kernel : {start, join, measure, find_largest, write})
    launch(kernel, blocks, dim3(THREADS), 0, device.stream, a, components);
  return workspace.bytes;
}

}  // namespace semiseg::cuda
