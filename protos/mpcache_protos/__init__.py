"""The messages between parties, generated from party.proto (`make protos`)."""
