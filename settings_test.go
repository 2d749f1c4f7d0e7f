package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

var goodSettings = []string{
	"WECHAT_APPID=wx0123456789abcdef", "WECHAT_APPSECRET=0123456789abcdef0123456789abcdef",
	"WECHAT_TOKEN=token123", "PUBLIC_URL=https://login.example.com",
}

// only returns an environment of the given settings, each NAME=value: the first
// of a name counts.
func only(settings ...string) func(string) string {
	return func(name string) string {
		for _, setting := range settings {
			if value, ok := strings.CutPrefix(setting, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

// with returns an environment: the good settings, changed by NAME=value.
func with(changes ...string) func(string) string {
	return only(slices.Concat(changes, goodSettings)...)
}

func none(string) string { return "" }

func TestASettingThatIsWrongIsNamedInOneLine(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	end() // so that a setting that is taken serves nobody
	hidden := []string{"WECHAT_APPSECRET=hush hush", "WECHAT_TOKEN=hush-hush", "WECHAT_TOKEN=ab",
		"WECHAT_TOKEN=" + strings.Repeat("a", 33), "WECHAT_AES_KEY=short", "SESSION_SECRET=hush-hush-too-short",
		"SESSION_SECRET=" + secretA + ",", "METRICS_TOKEN=hush hush", "API_TOKEN=fifteen-of-them"}
	shown := []string{"WECHAT_APPID=gh_97417a04a28d", "PUBLIC_URL=login.example.com",
		"PUBLIC_URL=https://login.example.com/wechat", "PUBLIC_URL=https://login.example.com?x",
		"PUBLIC_URL=https://u:p@login.example.com", "PUBLIC_URL=https://login.example.com\n", "TICKET_TTL=5",
		"TICKET_TTL=0s", "TICKET_TTL=1500ms", "TICKET_TTL=721h", "MAX_TICKETS=many", "MAX_TICKETS=0",
		"WECHAT_SCOPE=snsapi_login", "WECHAT_API_BASE=api.weixin.qq.com", "WECHAT_OPEN_BASE=https://a b",
		"WECHAT_MP_BASE=x", "SESSION_TTL=1s", "FLOWS=scan,scan", "FLOWS=codes,scan", "FLOWS=scan,",
		"SITE_NAME=" + strings.Repeat("长", 41), "CONFIRM=maybe", "ALLOWED_ORIGINS=*",
		"ALLOWED_ORIGINS=https://a.example.com/,https://b.example.com", "WECHAT_VERIFY_FILE=../MP_verify_x.txt",
		"PUSH_MAX_SKEW=10", "PUSH_MAX_SKEW=8761h", "QR_RATE=-1", "QR_RATE=1001", "TRUSTED_PROXIES=10.0.0.1",
		"LOG_LEVEL=loud", "LOG_FORMAT=xml", "ADDR=8080", "ADDR=256.0.0.1:x", "ADDR=unix:/run/wxscan.sock",
		"REDIS_CA=/nowhere", "WECHAT_ACCOUNT=a/b", "REDIS_PREFIX=a b"}
	for i, wrong := range append(hidden, shown...) {
		name, value, _ := strings.Cut(wrong, "=")
		want := "got something else, which is not shown here"
		if i >= len(hidden) {
			want = fmt.Sprintf("got %q", value)
		}
		got := fmt.Sprint(run(ended, nil, with(wrong), io.Discard, io.Discard))
		if !regexp.MustCompile("^"+name+`( \(-[a-z-]+\))?: must be .*$`).MatchString(got) ||
			!strings.HasSuffix(got, want) || strings.Contains(got, "hush") {
			t.Errorf("%s: %s, want %s: must be …, %s", wrong, got, name, want)
		}
	}
}

func TestSettingsThatDoNotGoTogetherAreRefused(t *testing.T) {
	for settings, want := range map[string]string{
		"TLS_CERT=x": "TLS_CERT (-tls-cert), TLS_KEY (-tls-key): must both be set, or neither",
		"-demo":      "WECHAT_APPSECRET: must not be set with -demo, where anyone can log in as anyone",
		"-demo WECHAT_APPSECRET= -tls-cert=x -tls-key=y": "TLS_CERT (-tls-cert): must not be set with -demo, " +
			"which speaks plain http",
		"-demo WECHAT_APPSECRET= REDIS_URL=redis://x": "REDIS_URL: must not be set with -demo, " +
			"which simulates WeChat for one process",
		"REDIS_URL=redis://x": "SESSION_SECRET: must be set with REDIS_URL, the same on each replica: " +
			"they check each other's sessions",
	} {
		var args, env []string
		for setting := range strings.FieldsSeq(settings) {
			if setting[0] == '-' {
				args = append(args, setting)
			} else {
				env = append(env, setting)
			}
		}
		_, err := parseConfig(args, with(env...))
		equal(t, settings, fmt.Sprint(err), want)
	}
}

func TestAllThatIsMissingOrWrongIsSaidAtOnceInBothLanguages(t *testing.T) {
	for language, want := range map[string][]string{
		"C": {
			"WECHAT_APPID: must be the appID on the account's page: wx, then letters and digits, but is not set",
			"WECHAT_APPSECRET: must be the appsecret on the account's page: letters and digits, but is not set",
			"PUBLIC_URL (-url): must be http(s)://host[:port], no path, where phones reach us, but is not set",
			`CONFIRM (-confirm): must be true or false: whether the phone must confirm a scan, got "maybe"`,
			"without an account, try wxscan -demo"},
		"zh_CN.UTF-8": {
			"WECHAT_APPID：应为公众号页面上的 appID：wx 加字母和数字，但未设置",
			"WECHAT_APPSECRET：应为公众号页面上的 appsecret：字母和数字，但未设置",
			"PUBLIC_URL (-url)：应为手机和微信访问本服务的地址 " +
				"http(s)://域名[:端口]，不带路径，但未设置",
			`CONFIRM (-confirm)：应为“true”或“false”：` +
				`扫码后是否须在手机上确认，实际为 "maybe"`,
			"没有公众号？可先试用 wxscan -demo"},
	} {
		getenv := only("WECHAT_TOKEN=token123", "CONFIRM=maybe", "LANG="+language)
		err := run(t.Context(), nil, getenv, io.Discard, io.Discard)
		if err == nil || err.Error() != strings.Join(want, "\n") {
			t.Errorf("%v\nwant\n%s", err, strings.Join(want, "\n"))
		}
	}
}

func TestUnknownWordsAreAnsweredWithTheKnownOnes(t *testing.T) {
	const commands = ": there are check, sign, version and help"
	const flags = "-account -addr -allowed-origins -confirm -demo -env -"
	for args, want := range map[string]string{
		"chek": `unknown command "chek"` + commands, "": `unknown command ""` + commands,
		"-ulr x":          "unknown flag -ulr: there are " + flags,
		"-appsecret=hush": "unknown flag -appsecret: there are " + flags,
		"-json":           "unknown flag -json: there are " + flags,
		"check -jason":    "unknown flag -jason: there are -account",
		"-demo check":     `unknown argument "check": a command goes first, and a flag begins with -`,
		"-demo -url":      "flag -url: its value is missing or malformed", "---x": "unknown flag -x",
	} {
		err := run(t.Context(), strings.Split(args, " "), none, io.Discard, io.Discard)
		if got := fmt.Sprint(err); !strings.HasPrefix(got, want) || strings.Contains(got, "hush") {
			t.Errorf("%q: %v, want %s", args, err, want)
		}
		err = run(t.Context(), strings.Split(args, " "), only("LC_ALL=zh_CN.UTF-8"), io.Discard, io.Discard)
		if !strings.ContainsFunc(fmt.Sprint(err), isHan) {
			t.Errorf("in Chinese: %q: %v", args, err)
		}
	}
}

func TestSettings(t *testing.T) {
	parse := func(getenv func(string) string, args ...string) config {
		t.Helper()
		c, err := parseConfig(args, getenv)
		must(t, err)
		return c
	}
	c := parse(with())
	if c.addr.String() != ":8080" || c.ttl != 5*time.Minute || c.maxTickets != 100000 || c.scope != "snsapi_base" ||
		c.aesKey != nil || c.demo || c.confirm || c.apiBase != "https://api.weixin.qq.com" ||
		c.openBase != "https://open.weixin.qq.com" || c.mpBase != "https://mp.weixin.qq.com" {
		t.Errorf("by default: %+v", c)
	}
	c = parse(with("TICKET_TTL=2m", "MAX_TICKETS=7", "PUBLIC_URL=http://[::1]:8080/", "WECHAT_AES_KEY="+docKey,
		"WECHAT_API_BASE=http://127.0.0.1:9/api/", "ADDR=127.0.0.1:9"), "-ttl", "720h")
	if c.ttl != 720*time.Hour || c.maxTickets != 7 || c.publicURL != "http://[::1]:8080" || c.aesKey == nil ||
		c.apiBase != "http://127.0.0.1:9/api" || c.addr.String() != "127.0.0.1:9" {
		t.Errorf("%+v", c)
	}
	equal(t, "-demo listens on", parse(none, "-demo").addr.String(), "127.0.0.1:8080")
	for value, want := range map[string]bool{"yes": true, "ON": true, "1": true, "off": false, "False": false} {
		equal(t, "CONFIRM="+value, parse(with("CONFIRM="+value)).confirm, want)
	}
	for flag, want := range map[string]bool{"-confirm": true, "-confirm=no": false} {
		equal(t, flag, parse(with("CONFIRM=maybe"), flag).confirm, want)
	}
}

// written writes a file for -env.
func written(t *testing.T, text string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "wxscan.env")
	must(t, os.WriteFile(file, []byte(text), 0o600))
	return file
}

func TestEnvFileGivesWhatIsNotSetOtherwise(t *testing.T) {
	file := written(t, "# a comment\r\n\n ; another\nTICKET_TTL=\"1m\"\r\nMAX_TICKETS= '7' \nQR_RATE=\nADDR=:9\n"+
		"WECHAT_VERIFY_FILE=MP_verify_x.txt\nLOG_LEVEL=debug\nLOG_LEVEL=warn\nHOME=/nowhere")
	c, err := parseConfig([]string{"-addr", ":7", "-env", file}, with("WECHAT_VERIFY_FILE=MP_verify_y.txt"))
	must(t, err)
	equal(t, "settings", fmt.Sprintln(c.ttl, c.maxTickets, c.qrRate, c.addr, c.verifyFile, c.logLevel),
		"1m0s 7 60 :7 MP_verify_y.txt WARN\n")
}

func TestEnvFileIsTakenByEachCommand(t *testing.T) {
	file := written(t, strings.Join(goodSettings, "\n"))
	var out strings.Builder
	must(t, run(t.Context(), []string{"sign", "-env", file}, none, &out, io.Discard))
	err := run(t.Context(), []string{"check", "-env", file, "-url", "http://" + freeAddress(t)},
		only("WECHAT_API_BASE=http://"+freeAddress(t)), &out, io.Discard)
	if err == nil || !strings.Contains(out.String(), "✓ the settings are complete and well-formed") {
		t.Errorf("%v: %s", err, out.String())
	}
	start(t, none, "-env", file, "-addr", "127.0.0.1:0")
}

func TestEnvFileWithWhatSystemdWouldPassOverIsRefused(t *testing.T) {
	for _, line := range []string{"export WECHAT_TOKEN=hush", "hush", "=hush", "WECHAT_TOKEN =hush", "2=hush",
		`WECHAT_TOKEN="hush`, `WECHAT_TOKEN=hush\`, `WECHAT_TOKEN="hu\"sh"`, `WECHAT_TOKEN='hush' # why`} {
		_, err := parseConfig([]string{"-env", written(t, "\n"+line+"\nADDR=:1\n")}, with())
		if err == nil || !strings.Contains(err.Error(), "line 2: must be NAME=value") ||
			strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v", line, err)
		}
	}
	if _, err := parseConfig([]string{"-env", "/nowhere"}, with()); err == nil ||
		err.Error() != `-env: cannot read "/nowhere": is the file there, and may this user read it?` {
		t.Error(err)
	}
}
