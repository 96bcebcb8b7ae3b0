"""How the weights of a matrix are rounded and stored: GPTQ, blocks, nibbles."""
