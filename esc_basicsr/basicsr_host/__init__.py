"""The only room that patches or enters BasicSR."""
