"""The assembled speech LLM: configuration, encoder, audio, processor."""
