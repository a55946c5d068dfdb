"""Will it fit: chips, the programs of a config, and facts of compiled programs."""
