package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func content(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	return string(text)
}

// forEachREADME runs a test with the text of each README.
func forEachREADME(t *testing.T, test func(t *testing.T, text string)) {
	for _, name := range []string{"README.md", "README.zh-CN.md"} {
		t.Run(name, func(t *testing.T) { test(t, content(t, name)) })
	}
}

// named returns what the groups of a pattern match in text, at least once.
func named(t *testing.T, text, pattern string) (all []string) {
	t.Helper()
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		all = append(all, strings.Join(match[1:], ""))
	}
	if len(all) == 0 {
		t.Fatalf("nothing matches %s", pattern)
	}
	return all
}

// among complains of each name that is not known.
func among(t *testing.T, known, names []string, complaint string) {
	t.Helper()
	for _, name := range names {
		if !slices.Contains(known, name) {
			t.Errorf("%s %q", complaint, name)
		}
	}
}

// code returns the blocks of code in a language, or in all of them.
func code(t *testing.T, text, language string) []string {
	t.Helper()
	return named(t, text, "(?ms)^```"+language+"\n(.*?)^```")
}

func TestREADMENamesTheSettingsThatExist(t *testing.T) {
	var help bytes.Buffer
	for _, args := range []string{"-h", "check -h", "sign -h"} {
		must(t, run(t.Context(), strings.Fields(args), none, &help, io.Discard))
	}
	flags := named(t, help.String(), `\B-([a-z-]+)`)
	forEachREADME(t, func(t *testing.T, text string) {
		text = regexp.MustCompile("(?s)```.*?```").ReplaceAllString(text, "")
		for _, s := range new(config).settings() {
			row := regexp.MustCompile("(?m)^\\|[^|]*`" + s.env + "`.*").FindString(text)
			if row == "" || s.flag != "" && !strings.Contains(row, "`-"+s.flag+"`") {
				t.Errorf("the table of settings has no %s with its flag %q", s.env, s.flag)
			}
			isSaid := s.env == "SESSION_SECRET" || strings.HasSuffix(s.env, "_BASE") || s.byDefault == ""
			if !isSaid && !strings.Contains(row, "`"+s.byDefault+"`") {
				t.Errorf("%s is %q by default, and its row says %q", s.env, s.byDefault, row)
			}
		}
		among(t, settingNames(), named(t, text, "`([A-Z]{4,})[`=]|\\b([A-Z]+_[A-Z_]+)\\b"), "there is no setting")
		among(t, flags, named(t, text, "`-([a-z-]+)"), "there is no flag")
	})
}

func settingNames() (names []string) {
	for _, s := range new(config).settings() {
		names = append(names, s.env)
	}
	return names
}

// TestREADMEGivesCommandsThatAreUnderstood has the program parse each command
// line; -h, at its end, lets it do no more.
func TestREADMEGivesCommandsThatAreUnderstood(t *testing.T) {
	file := regexp.MustCompile(`-env \S+`)
	forEachREADME(t, func(t *testing.T, text string) {
		for _, args := range named(t, text, `(?:go run \.|[^-\w/]\./wxscan|sudo wxscan)((?: [^\s|`+"`"+`]+)*)`) {
			args = file.ReplaceAllString(args, "-env /dev/null") + " -h"
			if err := run(t.Context(), strings.Fields(args), none, io.Discard, io.Discard); err != nil {
				t.Errorf("wxscan%s: %v", args, err)
			}
		}
	})
}

func TestREADMENamesPathsThatAreAnswered(t *testing.T) {
	w := newWorld(t, "FLOWS=scan,auth,code", "API_TOKEN=0123456789abcdef")
	paths := `((?:GET|POST) /(?:[\w./]*\w)?)|(/(?:wechat|static|demo)/[\w./]*\w|/healthz|/metrics)`
	forEachREADME(t, func(t *testing.T, text string) {
		for _, call := range named(t, text, paths) {
			method, path, ok := strings.Cut(call, " ")
			if !ok {
				method, path = "GET", call
			}
			logged := len(w.logged.String())
			out := w.do(method, path, "")
			isUnknown := strings.Contains(w.logged.String()[logged:], "route=/ ")
			isMissing := out.Code == 404 && strings.HasPrefix(path, "/static/")
			if isUnknown && (out.Code == 404 || ok) || isMissing {
				t.Errorf("%s %s: %d %s", method, path, out.Code, out.Body)
			}
		}
	})
}

// anInterface is the section on the interface, of a README in either language.
func anInterface(text string) string {
	_, text, _ = strings.Cut(text, "| `GET /wechat/getloginqr`")
	text, _, _ = strings.Cut(text, "\n[")
	return text
}

// TestREADMENamesTheFieldsThatAreAnswered goes both ways: what is in an answer
// is in the section on the interface, and what is in an object there is answered.
func TestREADMENamesTheFieldsThatAreAnswered(t *testing.T) {
	w := newWorld(t, "WECHAT_SCOPE=snsapi_userinfo", "CONFIRM=true", "FLOWS=scan,auth,code")
	fields := make(map[string]any)
	add := func(out *httptest.ResponseRecorder) { must(t, json.Unmarshal(out.Body.Bytes(), &fields)) }
	for _, begin := range []string{"getloginqr", "getauthqr", "getlogincode"} {
		add(w.do("GET", "/wechat/"+begin, ""))
		w.issued = append(w.issued, fields["ticket"].(string))
	}
	ticket, secret := w.asked(t, "getauthqr")
	poll := "/wechat/checklogin?ticket=" + ticket
	add(w.do("GET", poll, "")) // scanned
	w.answerPhone(secret, "yes")
	add(w.do("GET", poll, "")) // done
	add(w.do("GET", "/wechat/session", "", "Authorization", "Bearer "+fields["token"].(string)))
	w.setFault(func(rw http.ResponseWriter, _ *http.Request) bool {
		fmt.Fprint(rw, `{"errcode":40013}`)
		return true
	})
	add(w.do("GET", "/wechat/getloginqr", ""))
	forEachREADME(t, func(t *testing.T, text string) {
		text = anInterface(text)
		objects := strings.Join(named(t, text, "`\\{([^`]*)`"), ",")
		inJSON := named(t, regexp.MustCompile(`:"[^"]*"`).ReplaceAllString(objects, ""), `"(\w+)"`)
		answered := slices.Collect(maps.Keys(fields))
		among(t, answered, inJSON, "no answer has a field")
		among(t, named(t, text, "[`\"](\\w+)[`\"]"), answered, "no word of the field")
	})
}

func TestREADMENamesTheErrorsThatAreAnswered(t *testing.T) {
	w := newWorld(t)
	var answered []string
	for _, err := range []error{errNoTicket, errPush, errNoSession, errSignature, errCrossOrigin, errNothingHere,
		errMethod, errTooLarge, errRateLimited, errGuessing, errTooManyTickets, errStoreUnavailable,
		errRefused, errUnreachable, errTimeout, errors.New("another")} {
		out := httptest.NewRecorder()
		w.fail(out, httptest.NewRequest("GET", "/", nil), err)
		var answer struct{ Error string }
		must(t, json.Unmarshal(out.Body.Bytes(), &answer))
		answered = append(answered, fmt.Sprintf("`%s` %d", answer.Error, out.Code))
	}
	forEachREADME(t, func(t *testing.T, text string) {
		said := named(t, anInterface(text), "(`[a-z_]+` \\d{3})")
		among(t, answered, said, "nothing is answered with")
		among(t, said, answered, "no word of the error")
	})
}

func TestDocumentsNameFilesThatExist(t *testing.T) {
	documents, err := filepath.Glob("docs/*.md")
	must(t, err)
	for _, document := range append(documents, "README.md", "README.zh-CN.md", "CONTRIBUTING.md") {
		pattern := `\]\(([^:)]+)\)`
		if document == "CONTRIBUTING.md" {
			pattern += "|`([\\w./]+\\.(?:go|sh|example)|\\.ci/run|static/|deploy/)`"
		}
		for _, link := range regexp.MustCompile(pattern).FindAllStringSubmatch(content(t, document), -1) {
			file := filepath.Join(filepath.Dir(document), link[1]+strings.Join(link[2:], ""))
			if _, err := os.Stat(file); err != nil && file != "utils.go" { // which is refused
				t.Errorf("%s: %v", document, err)
			}
		}
	}
	rooms, err := filepath.Glob("*.go")
	must(t, err)
	rooms = slices.DeleteFunc(rooms, func(file string) bool { return strings.HasSuffix(file, "_test.go") })
	among(t, named(t, content(t, "CONTRIBUTING.md"), "`(\\w+\\.go)`"), rooms, "CONTRIBUTING.md does not name")
}

func TestREADMEsLinkEachOtherAndHoldTheSameCode(t *testing.T) {
	var blocks [][]string
	forEachREADME(t, func(t *testing.T, text string) {
		named(t, text, `\[(?:中文\]\(README\.zh-CN|English\]\(README)\.md\)`)
		blocks = append(blocks, code(t, text, `\w+`))
		if lines := strings.Count(text, "\n"); lines >= 170 {
			t.Errorf("it has %d lines", lines)
		}
	})
	if !slices.Equal(blocks[0], blocks[1]) {
		t.Errorf("the code differs: %q and %q", blocks[0], blocks[1])
	}
}

// TestREADMELogsInFromTheShell runs the README's smoke.sh against the simulator
// and, as with a real phone, where there is none: then somebody scans only once the
// shell has been told that nobody has yet.
func TestREADMELogsInFromTheShell(t *testing.T) {
	program(t, "curl", "curl")
	base, _, _ := start(t, none, "-demo", "-addr", "127.0.0.1:0")
	target, err := url.Parse(base)
	must(t, err)
	through, polls := httputil.NewSingleHostReverseProxy(target), 0
	real := newLocalServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch isPoll := r.URL.Path == "/wechat/checklogin"; {
		case strings.HasPrefix(r.URL.Path, "/demo/"):
			http.NotFound(w, r)
			return
		case isPoll && polls == 0:
			r.URL.RawQuery = strings.ReplaceAll(r.URL.RawQuery, "wait=", "x=")
			polls++
		case isPoll:
			scanned(t, base, r.FormValue("ticket"), "bob")
		}
		through.ServeHTTP(w, r)
	}))
	var script, promised string
	forEachREADME(t, func(t *testing.T, text string) {
		script, promised = code(t, text, "sh")[1], named(t, text, "`(\\{\"login\":true[^`…]*)`")[0]
	})
	for _, test := range []struct{ server, flow, openID string }{
		{base, "getloginqr", "alice"}, {base, "getauthqr", "alice"}, {real, "getloginqr", "bob"},
	} {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", script, "smoke.sh", test.flow)
		cmd.Env = append(os.Environ(), "B="+test.server)
		out, err := cmd.CombinedOutput()
		want := strings.Replace(promised, "alice", test.openID, 1)
		lines := strings.Split(string(out), "\n")
		if err != nil || !strings.HasPrefix(lines[max(0, len(lines)-2)], want) {
			t.Errorf("%s: %v, %s; want %s", test.flow, err, out, want)
		}
	}
}

// TestREADMEsExamplesKnowWhoIsLoggedIn runs what the README gives for Go, Node
// and Python, each within what is left out there; not for PHP and Java.
func TestREADMEsExamplesKnowWhoIsLoggedIn(t *testing.T) {
	t.Parallel()
	base, _, _ := start(t, none, "-demo", "-addr", "127.0.0.1:0")
	qr := begun(t, base, "getauthqr")
	scanned(t, base, qr.Ticket, "alice")
	cookie := "wxscan_session=" + polled(t, base, qr.Ticket, "25").Token
	for _, example := range []struct{ language, file, program, debianPackage, before, after string }{
		{"go", "main.go", "go", "golang", `package main
			import ("fmt"; "net/http"; "os")
			func main() {
				err := ask(&http.Request{Header: http.Header{"Cookie": os.Args[1:]}})
				if err != nil { panic(err) }
			}
			func ask(r *http.Request) error {
			`, `
			fmt.Print(openID)
			return nil }`},
		{"js", "main.mjs", "node", "nodejs",
			"const req = { headers: { cookie: process.argv[2] } };\n", "process.stdout.write(openid ?? '');"},
		{"python", "main.py", "python3", "python3",
			"import http.client, sys\ncookies = (sys.argv[1:] or [''])[0]\n", "print(openid or '', end='')"},
	} {
		t.Run(example.language, func(t *testing.T) {
			t.Parallel()
			program := program(t, example.program, example.debianPackage)
			file := filepath.Join(t.TempDir(), example.file)
			address := strings.NewReplacer("http://127.0.0.1:8080", base, `"127.0.0.1", 8080`,
				strings.Replace(strings.Replace(base, "http://", `"`, 1), ":", `", `, 1))
			given := code(t, content(t, "README.md"), example.language)[0]
			source := example.before + address.Replace(given) + example.after
			must(t, os.WriteFile(file, []byte(source), 0o600))
			for want, args := range map[string][]string{"alice": {file, cookie}, "": {file}} {
				if example.language == "go" {
					args = append([]string{"run"}, args...)
				}
				out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput()
				if err != nil || string(out) != want {
					t.Errorf("%v, %q; want %q", err, out, want)
				}
			}
		})
	}
}

func TestComposeStartsTheReplicasThatNginxAsks(t *testing.T) {
	compose := content(t, "compose.yaml")
	asked := named(t, content(t, "deploy/replicas.conf"), `server (wxscan-\d):8080`)
	if services := named(t, compose, `(?m)^  (wxscan-\d):`); !slices.Equal(services, asked) {
		t.Errorf("nginx asks %q, there are %q", asked, services)
	}
	among(t, settingNames(), named(t, compose, `(?m)^      ([A-Z_]+):`), "there is no setting")
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
	among(t, settingNames(), slices.Collect(maps.Keys(given)), "there is no setting")
	for _, s := range new(config).settings() {
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
	c, err := parseConfig(nil, func(name string) string { return cmp.Or(with()(name), given[name]) })
	if err != nil || !c.confirm {
		t.Errorf("filled in: %v, confirm is %v", err, c.confirm)
	}
}

// TestImageBuildsFromWhatTheContextHolds runs the Dockerfile's build in a clone
// without what .dockerignore keeps out: had it left out a file that git knows,
// the version would say +dirty. The program must need no library: scratch has none.
func TestImageBuildsFromWhatTheContextHolds(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command("git", "rev-parse", "HEAD").CombinedOutput(); err != nil {
		t.Skipf("no git repository: %s", out)
	}
	command := named(t, content(t, "Dockerfile"), `(?m)^RUN (CGO_ENABLED(?:.*\\\n)*.*)$`)[0]
	if !strings.Contains(command, "-o /wxscan ") {
		t.Fatalf("the Dockerfile's build is %s", command)
	}
	script := []string{`set -e; git clone -q . "$OUT/src"; cd "$OUT/src"`}
	for _, pattern := range named(t, content(t, ".dockerignore"), `(?m)^([^#\s]\S*)$`) {
		script = append(script, "rm -rf ./"+pattern)
	}
	script = append(script, strings.Replace(command, "-o /wxscan ", `-o "$OUT/wxscan" `, 1),
		`"$OUT/wxscan" version; ! ldd "$OUT/wxscan"`)
	cmd := exec.Command("sh", "-c", strings.Join(script, "\n"))
	cmd.Env = append(os.Environ(), "OUT="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil || regexp.MustCompile("dirty|devel").Match(out) || !bytes.Contains(out, []byte("wxscan v")) {
		t.Errorf("%v: %s", err, out)
	}
}
