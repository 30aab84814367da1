"""Reading a whole data set once and saying what is in it: what training would refuse, lose or see twice."""
