"""Which tiles a kernel works on: pure functions of the sizes of a model, never of the number of voxels."""

from typing import NamedTuple

REGISTER_CHANNELS = 32  # up to here every thread keeps its voxels' embeddings to itself
REGISTER_CLUSTERS = 16
FEWEST_COLUMNS = 16  # that tensor cores multiply
DIRECT_CLUSTERS, DIRECT_PER_CLASS = 128, 8  # whose coefficients of a tile the registers can hold
SCRATCH_PROGRAMS = 512  # enough to keep any GPU busy
VOXELS_PER_PROGRAM = 1024  # whose sums are float32, those of all programs float64
ROWS_PER_PROGRAM, MAX_SUMMING_PROGRAMS = 256, 1 << 15  # of sums over programs; a grid's second axis has 65,535
MAX_SUM_BYTES = 8  # a voxel, of what programs that sum leave, about
MAX_COLUMNS, MAX_PER_CLASS = 256, 16  # more would spill
MAX_REGIONS = 4  # counted in one read of the voxels
MIX_CLASSES = 8  # up to here tensor cores would mostly multiply padding
MAX_MIX_CLASSES = 128  # more would spill
NORM_ELEMENTS = 4096  # of a tile, whatever its shape
NORM_CHANNELS, NORM_PLANES = 64, 16  # of a tile at most, channels-last and else; rows of 128 bytes or more
NORM_PROGRAMS = 1024  # enough to keep any GPU busy
NORM_TILES = 16  # of a program, added in float32
UPSAMPLING_CHANNELS, UPSAMPLING_CELLS = 64, 1024  # channels-last, of a tile at most, and of all its channels
UPSAMPLING_PLANES, UPSAMPLING_PLANE_CELLS = 4, 512  # the same of planes; more would spill
MIX_PROGRAMS, MIX_SUMS = 2048, 1 << 21  # of backward; of all programs together, 16 MB


class PrototypeTiles(NamedTuple):
    """How the operations with prototypes divide their work."""

    classes: int  # C and K rounded up to powers of two
    per_class: int
    block: int  # voxels of a tile
    chunk: int  # channels read at a time; 1: multiply-adds in registers, more: tensor cores
    gradient_chunk: int  # the same of backward
    tiles: int  # tiles of a program
    fused: bool  # cluster sums are taken in the same read
    # of backward, each with scratch memory of its own; None: a program per tile, no scratch
    programs: int | None
    num_warps: int
    similarity_warps: int  # of the similarity's backward, which keeps less at a time
    cluster_warps: int  # of the cluster mean, which does too


class ClassTiles(NamedTuple):
    """How the operation on logits divides its work."""

    classes: int  # C rounded up to a power of two
    block: int
    tiles: int
    num_warps: int


class ClassProductTiles(NamedTuple):
    """How products of maps of classes with the channels of voxels are divided."""

    classes: int  # multiplied at a time
    channels: int  # of a program
    sum_block: int  # voxels that are added in float32
    tiles: int  # of a program that sums
    mix_block: int


class MixTiles(NamedTuple):
    """How prompt mixing divides its work."""

    classes: int  # C rounded up to a power of two
    block: int
    chunk: int  # channels of the prompt at a time; 1: multiply-adds in registers, more: tensor cores
    num_warps: int


class UpsamplingTiles(NamedTuple):
    """How upsampling divides its work."""

    channels: int
    block: int  # cells or voxels


class NormTiles(NamedTuple):
    """How batch normalisation divides its work."""

    channels: int
    block: int


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def tiles_per_program(block: int) -> int:
    """Tiles of a program that sums over its voxels."""
    return max(VOXELS_PER_PROGRAM // block, 1)


def rows_per_program(rows: int) -> int:
    """Rows of partial sums that a program adds."""
    return max(ROWS_PER_PROGRAM, -(-rows // MAX_SUMMING_PROGRAMS))


def fits_tiles(operation: str, num_classes: int, per_class: int) -> bool:
    """Whether a voxel's cosines with all prototypes, or its shares, find room in the registers of a tile."""
    columns = power_of_two(num_classes) * power_of_two(per_class)
    most = MAX_MIX_CLASSES if operation == "prompt_mix" else MAX_COLUMNS
    return columns <= most and per_class <= MAX_PER_CLASS


def prototype_tiles(d: int, num_classes: int, per_class: int, channels_last: bool) -> PrototypeTiles:
    classes, clusters_of_class = power_of_two(num_classes), power_of_two(per_class)
    clusters = classes * clusters_of_class
    # A single channel is in both formats; its gradient is 0, which products of parts on tensor cores would not find.
    if (not channels_last or d == 1) and d <= REGISTER_CHANNELS and clusters <= REGISTER_CLUSTERS:
        # A thread's voxels lie side by side, for wide loads; with more than 32 cosines it would spill.
        block, chunk, num_warps = (512 if clusters <= 8 else 128), 1, 4
        gradient_chunk = chunk
    else:
        clusters_of_class = max(clusters_of_class, FEWEST_COLUMNS // classes)
        clusters = classes * clusters_of_class
        # Many columns go with fewer than 64 voxels, so that the warps share the columns.
        chunk = 16 if d <= 16 or clusters >= 128 else 32  # wider ones would spill
        gradient_chunk = 16 if d <= 16 or clusters > 128 else 32
        block = min(max(2048 // clusters, 16), 128)
        num_warps = 4 if clusters < 64 else 8
    # The sums of a tile must be few beside its embeddings.
    fused = num_classes * per_class * (d + 1) <= 2 * block
    tiles = 1 if fused else tiles_per_program(block)
    direct = clusters <= DIRECT_CLUSTERS and per_class <= DIRECT_PER_CLASS
    programs = None if direct else SCRATCH_PROGRAMS
    similarity_warps = num_warps if direct else 4
    cluster_warps = 4 if clusters < 128 else num_warps
    return PrototypeTiles(
        classes, clusters_of_class, block, chunk, gradient_chunk, tiles, fused, programs,
        num_warps, similarity_warps, cluster_warps,
    )  # fmt: skip


def class_tiles(num_classes: int) -> ClassTiles:
    classes = power_of_two(num_classes)
    block = min(max(2048 // classes, 16), 512)
    return ClassTiles(classes, block, tiles_per_program(block), 4 if classes <= 128 else 8)


def class_product_tiles(d: int, num_classes: int) -> ClassProductTiles:
    # In several groups of 32 they would spill.
    classes = FEWEST_COLUMNS if num_classes > 32 else max(power_of_two(num_classes), FEWEST_COLUMNS)
    channels = min(max(power_of_two(d), FEWEST_COLUMNS), 32)
    sum_block, mix_block = 32, 64
    sums = power_of_two(num_classes) * power_of_two(d)
    tiles = max(tiles_per_program(sum_block), 4 * sums // (MAX_SUM_BYTES * sum_block))
    return ClassProductTiles(classes, channels, sum_block, tiles, mix_block)


def mix_tiles(num_classes: int, channels_last: bool, backward: bool) -> MixTiles:
    """`channels_last` is the layout of the prompt."""
    classes = power_of_two(num_classes)
    if not channels_last and classes <= MIX_CLASSES:
        # A thread's voxels lie side by side. Backward sums over voxels: one warp waits for no others.
        block, num_warps = (min(1024 // classes, 512), 1) if backward else (512, 4)
        return MixTiles(classes, block, 1, num_warps)
    classes = max(classes, FEWEST_COLUMNS)
    block = max(1024 // classes, 16)
    if backward:  # two products at once
        return MixTiles(classes, block if classes == FEWEST_COLUMNS else 16, 16, 4)
    chunk, num_warps = (16, 4) if classes < 64 else (32, 8)
    return MixTiles(classes, block, chunk, num_warps)


def mix_programs(tiles: int, sums: int) -> int:
    """Programs of backward, each with sums over its voxels."""
    return min(max(tiles, 1), MIX_PROGRAMS, max(MIX_SUMS // sums, 16))


def norm_tiles(num_channels: int, channels_last: bool) -> NormTiles:
    if channels_last:
        channels = min(power_of_two(num_channels), NORM_CHANNELS)
    else:
        channels = NORM_PLANES if num_channels >= NORM_PLANES else 1  # some numbers between them would spill
    return NormTiles(channels, NORM_ELEMENTS // channels)


def norm_tiles_per_program(tiles: int) -> int:
    """Tiles of a program of batch normalisation that sums over its voxels."""
    return min(max(tiles // NORM_PROGRAMS, 1), NORM_TILES)


def upsampling_tiles(num_channels: int, channels_last: bool, backward: bool) -> UpsamplingTiles:
    if channels_last:
        most, cells = UPSAMPLING_CHANNELS, UPSAMPLING_CELLS
    else:
        most, cells = UPSAMPLING_PLANES, UPSAMPLING_PLANE_CELLS
    channels = min(power_of_two(num_channels), most)
    # Backward reads an element from up to 64 places, and would spill.
    return UpsamplingTiles(channels, cells // channels // (2 if backward else 1))


def regions_at_once(num_regions: int) -> int:
    return min(power_of_two(num_regions), MAX_REGIONS)
