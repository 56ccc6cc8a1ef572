"""The names that other libraries have for what gptcore does, so that programs written for them run on it."""
