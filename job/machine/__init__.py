"""The machine at hand: devices, memory and disk, scratch space, the terminal."""
