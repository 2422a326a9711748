"""The server, from the outside: clients, fuzzers, and people who leave."""
