"""How the weights of one op become codes once their step is known."""
