scope "open" {
  process {
