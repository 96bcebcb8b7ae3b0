"""The torch module that is compressed: where its layers and matrices are, and how they are changed."""
