package main

import "github.com/spf13/cobra"

func doctorCommand(_ *options) *cobra.Command { return &cobra.Command{Use: "doctor"} }
