"""The hyper-parameters of the paper (Tables 9 to 12 and 17), of its code, and of the prior work that it quotes."""
