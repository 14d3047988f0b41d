"""How time is taken: clocks, interleaving, statistics, and the machine it happens on."""
