"""The Hugging Face glue: loading, publishing, training and evaluating with transformers."""
