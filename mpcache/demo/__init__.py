"""The demo model, a document with a question, and unseen documents to judge it by."""
