package systemd

import "testing"

// What a unit will run is told by the host's file only if that is what the unit sees.
func TestElsewhere(t *testing.T) {
	const path = "/usr/bin/billingd"
	for name, tt := range map[string]struct {
		service map[string]any
		want    string
	}{
		"plain":                              {map[string]any{"RootDirectory": "", "RootImage": "", "BindPaths": [][]any{}, "ExtensionDirectories": []string{}, "TemporaryFileSystem": [][]any{}}, ""},
		"the host's root, and mounts beside": {map[string]any{"RootDirectory": "/", "BindReadOnlyPaths": [][]any{{"/a", "/usr/bin2", false, uint64(0)}, {"/a", "/usr/bin/billing", false, uint64(0)}}, "TemporaryFileSystem": [][]any{{"/var", ""}}}, ""},
		"a root of its own":                  {map[string]any{"RootDirectory": "/srv/x"}, "RootDirectory"},
		"an image":                           {map[string]any{"RootImage": "/x.raw"}, "RootImage"},
		"a mount over it":                    {map[string]any{"BindPaths": [][]any{{"/home/x", path, false, uint64(0)}}}, "BindPaths"},
		"over its folder":                    {map[string]any{"BindReadOnlyPaths": [][]any{{"/home/x", "/usr/bin/", false, uint64(0)}}}, "BindReadOnlyPaths"},
		"over everything":                    {map[string]any{"TemporaryFileSystem": [][]any{{"/", ""}}}, "TemporaryFileSystem"},
		"an image over it":                   {map[string]any{"MountImages": [][]any{{"/x.raw", "/usr", false, [][]any{}}}}, "MountImages"},
		"an extension":                       {map[string]any{"ExtensionImages": [][]any{{"/x.raw", false, [][]any{}}}}, "ExtensionImages"},
		"an extension's tree":                {map[string]any{"ExtensionDirectories": []string{"/x"}}, "ExtensionDirectories"},
	} {
		if got := elsewhere(tt.service, path); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}
