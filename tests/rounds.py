"""What each block of a persistent Hopper launch takes under a causal mask, by the plan alone."""

from cupyattn.plan import tile_of_round


def places_of_blocks(plan, seqlen, units):
    """For each block the places of its tiles in their sequences, 0 the first rows, of so many `units`."""
    tiles, size = -(-seqlen // plan.tile.tokens), plan.tile.units_per_section
    sections = [min(size, units - first) for first in range(0, units, size)]
    places = []
    for index, count in enumerate(sections):
        rises = index % 2 == len(sections) % 2
        order = range(tiles) if rises else range(tiles - 1, -1, -1)
        places += [place for place in order for _ in range(count)]
    blocks, taken = plan.num_workers, []
    for block in range(blocks):
        its = (tile_of_round(x, block, blocks, True) for x in range(-(-len(places) // blocks)))
        taken.append([places[index] for index in its if index < len(places)])
    return taken
