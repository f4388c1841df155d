"""What makes the engine fast on a CPU, and its answers the same to the bit in every batch."""
