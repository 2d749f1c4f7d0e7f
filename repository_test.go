package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func content(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	return string(text)
}

func TestEnvExampleNamesTheSettingsThatExist(t *testing.T) {
	given, commented := map[string]string{}, map[string]bool{}
	line := regexp.MustCompile(`^(#?)([A-Z_]+)=(\S*)\n$`)
	for text := range strings.Lines(content(t, "wxscan.env.example")) {
		if parts := line.FindStringSubmatch(text); parts != nil {
			given[parts[2]], commented[parts[2]] = parts[3], parts[1] != ""
		} else if text != "\n" && !strings.HasPrefix(text, "# ") {
			t.Errorf("neither a setting nor a comment: %q", text)
		}
	}
	settings := new(config).settings()
	for _, s := range settings {
		value, ok := given[s.env]
		switch {
		case !ok:
			t.Errorf("%s is missing", s.env)
		case commented[s.env] && value != s.byDefault:
			t.Errorf("%s is %q by default, the file says %q", s.env, s.byDefault, value)
		case !commented[s.env] && value != "" && s.env != "CONFIRM":
			t.Errorf("%s is %q", s.env, value)
		}
	}
	if len(given) > len(settings) {
		t.Errorf("%d settings, of %d", len(given), len(settings))
	}
	c, err := parseConfig(nil, func(name string) string {
		if required := with()(name); required != "" {
			return required
		}
		return given[name]
	}, t.Output())
	if err != nil || !c.confirm {
		t.Errorf("filled in: %v, confirm is %v", err, c.confirm)
	}
}

func TestCONTRIBUTINGNamesEveryFile(t *testing.T) {
	text := content(t, "CONTRIBUTING.md")
	files, err := filepath.Glob("*.go")
	must(t, err)
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") && !strings.Contains(text, "`"+file+"`") {
			t.Errorf("%s is not in it", file)
		}
	}
	const names = "`([\\w./]+\\.(?:go|sh|example)|\\.ci/run|static/|deploy/)`|\\]\\(([\\w./]+)\\)"
	for _, file := range named(t, text, names) {
		if _, err := os.Stat(file); err != nil && file != "utils.go" { // which is refused
			t.Error(err)
		}
	}
}

// TestImageBuildsFromWhatTheContextHolds runs the Dockerfile's build in a clone
// without what .dockerignore keeps out: had it left out a file that git knows,
// the version would say +dirty.
func TestImageBuildsFromWhatTheContextHolds(t *testing.T) {
	if out, err := exec.Command("git", "rev-parse", "HEAD").CombinedOutput(); err != nil {
		t.Skipf("no git repository: %s", out)
	}
	folder := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "OUT="+folder)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v, %s", name, args, err, out)
		}
		return string(out)
	}
	source := filepath.Join(folder, "src")
	run("git", "clone", "-q", ".", source)
	for line := range strings.Lines(content(t, ".dockerignore")) {
		if pattern := strings.TrimSpace(line); pattern != "" && !strings.HasPrefix(pattern, "#") {
			run("sh", "-c", `cd "$0" && rm -rf ./`+pattern, source)
		}
	}
	command := named(t, content(t, "Dockerfile"), `(?m)^RUN (CGO_ENABLED(?:.*\\\n)*.*)$`)[0]
	if !strings.Contains(command, "-o /wxscan ") {
		t.Fatalf("the Dockerfile's build is %s", command)
	}
	run("sh", "-c", `cd "$OUT/src" && `+strings.Replace(command, "-o /wxscan ", `-o "$OUT/wxscan" `, 1))
	version := run(filepath.Join(folder, "wxscan"), "version")
	if strings.Contains(version, "dirty") || strings.Contains(version, "devel") {
		t.Errorf("the version is %s", version)
	}
	if out, err := exec.Command("ldd", filepath.Join(folder, "wxscan")).CombinedOutput(); err == nil {
		t.Errorf("it needs libraries, and scratch has none: %s", out)
	}
}
