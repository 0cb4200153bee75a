"""Records of gradients, and the low-rank products that scores take of them."""
