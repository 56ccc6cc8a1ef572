"""Files of other projects: pretrained folders, the Hugging Face Hub and GGUF."""
