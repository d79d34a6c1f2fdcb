"""What keeps a run alive: its start, devices and processes, checkpoints, memory, signals, what it reports."""
