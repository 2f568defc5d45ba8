"""Training data: images for the tokenizer; chats, documents and codes for the unified model."""
