"""How much a layer, an attention sublayer, a head or a channel matters."""
