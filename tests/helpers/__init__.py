"""What several test files share: models, data, references and launchers. No tests are here."""
