"""Speech-to-LLM adapters: CFormer and the convolutional baseline."""
