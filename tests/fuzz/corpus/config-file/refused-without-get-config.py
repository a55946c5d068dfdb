config = 3
