"""What a KV cache is: its layout, its rotation, the buffer that holds it, and the proof that relocation is exact."""
