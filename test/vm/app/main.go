// Command app stands for a legacy program in the virtual machine: it reads a
// credential file again and again, and says each user that it finds there.
package main

import (
	"fmt"
	"os"
	"strings"
	"time"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: app FILE")
		os.Exit(2)
	}
	for last := ""; ; time.Sleep(100 * time.Millisecond) {
		b, err := os.ReadFile(os.Args[1])
		if err != nil {
			continue
		}
		line, _, _ := strings.Cut(string(b), "\n")
		if user, ok := strings.CutPrefix(line, "user="); ok && user != last {
			fmt.Println("app: user", user)
			last = user
		}
	}
}
