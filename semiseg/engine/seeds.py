"""Seeds of random streams that must differ from each other, derived from the run's one seed."""

import numpy as np

STAGES, PROCESSES = range(2)  # purposes; but for number 0, a stream of one never meets one of another


def derived_seed(seed: int, purpose: int, number: int) -> int:
    """The seed of a purpose's stream of that number: `seed` itself for number 0, else 32 bits mixed from all three."""
    if number == 0:
        return seed
    # Not a sum or stride: of a seed PyTorch's generator on the CPU keeps the low 32 bits only.
    return int(np.random.SeedSequence(seed, spawn_key=(purpose, number)).generate_state(1)[0])
