"""What `plan.py` is made of: chips, programs of a config, and facts of compiled programs."""
