"""Text to tokens and back, and messages to text."""
