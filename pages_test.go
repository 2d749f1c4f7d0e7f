package main

import (
	"fmt"
	"io/fs"
	"net/url"
	"regexp"
	"strings"
	"testing"
)

func TestTheLoginPageSaysWhereOneLogsInHowAndAsWhom(t *testing.T) {
	const cookie, mallory, escaped = "wxscan_session=", `"><b>`, "&#34;&gt;&lt;b&gt;"
	w := newWorld(t, "WECHAT_SCOPE=snsapi_userinfo")
	qr := w.begin(t, "getauthqr")
	w.scan(qr.Ticket, mallory, "")
	token := w.check(t, qr.Ticket, "").Token
	for _, test := range []struct{ setting, cookie, want string }{
		{"", "", "</span> 127.0.0.1:80</h1>"},
		{"SITE_NAME=A <b> & C", "", "</span> A &lt;b&gt; &amp; C</h1>"},
		{"", "", `data-wxscan="scan,auth"`},
		{"FLOWS=auth,scan", "", `data-wxscan="auth,scan"`},
		{"", cookie + token, `data-openid="` + escaped + `" data-nickname="` + escaped + `" data-avatar="http://127`},
		{"", cookie + token + "x", `data-openid=""`},
	} {
		other := newWorld(t, test.setting)
		other.signer = w.signer
		page := other.do("GET", "/", "", "Cookie", test.cookie).Body.String()
		equal(t, test.setting+" shows "+test.want, strings.Contains(page, test.want), true)
	}
	w.config.demo = false // only the demo's pages may stand in a frame: see TestRoutes
	for _, page := range []string{"/", "/static/html/loginsucceed.html", "/static/wxscan.js"} {
		policy := w.do("GET", page, "").Header().Get("Content-Security-Policy")
		if !strings.HasSuffix(policy, "; frame-ancestors 'none'") || strings.Contains(policy, "frame-src") {
			t.Errorf("%s: %s", page, policy)
		}
	}
}

func TestTheSimulatedChatShowsLinksAsLinksAndAllElseAsText(t *testing.T) {
	for message, want := range map[string]string{
		`a <a href="http://x.test/?s=1&t=2">b</a>, <b>`: `a <a href="http://x.test/?s=1&amp;t=2">b</a>, &lt;b&gt;`,
		`<a href="javascript:alert(1)">x</a>`:           `&lt;a href=&#34;javascript:alert(1)&#34;&gt;x&lt;/a&gt;`,
		`<a href="http://x" id="y">x</a>`:               `&lt;a href=&#34;http://x&#34; id=&#34;y&#34;&gt;x&lt;/a&gt;`,
	} {
		if got := bubble(message); string(got) != want {
			t.Errorf("%s: %s, want %s", message, got, want)
		}
	}
}

func TestPagesHaveNothingInline(t *testing.T) {
	inline := regexp.MustCompile(`<style|<script>|\s(style|on[a-z]+)=|javascript:|https?://`)
	pages, err := fs.Glob(static, "static/*/*.html")
	must(t, err)
	equal(t, "pages, besides the login page", len(pages), 4)
	for _, name := range append(pages, "static/index.html") {
		page, err := static.ReadFile(name)
		must(t, err)
		equal(t, name+" has", inline.FindString(string(page)), "")
	}
}

func TestReturnToTakesEveryPathOfThisSite(t *testing.T) {
	for query, want := range map[string]string{
		"return_to=":                              "",
		"return_to=/":                             "/",
		"return_to=%2Freports%2F7%3Fa%3D1%262":    "/reports/7?a=1&2",
		"return_to=/reports/7?a=1&b=2":            "/reports/7?a=1&b=2", // as a proxy appends it
		"x=1&return_to=%2Fa&y=2":                  "/a",
		"return_to=/报告":                           "/报告",
		"return_to=%2F%E6%8A%A5%E5%91%8A":         "/报告",
		"return_to=%2Fa%20b+c":                    "/a b c",
		"return_to=/x?url=https%3A%2F%2Fa.test":   "/x?url=https%3A%2F%2Fa.test",
		"return_to=%2Fx%3Furl%3Dhttps%3A//a.test": "/x?url=https://a.test",
		"return_to=/100%25":                       "/100%25",
		"return_to=%2F100%2525%23end":             "/100%25#end",
		"xreturn_to=/a":                           "",
		"return_to=reports":                       "",
		"return_to=https://evil.com":              "",
		"return_to=/%zz":                          "",
		"return_to=%2F100%25":                     "",
	} {
		equal(t, fmt.Sprintf("returnTo(%.80q) =", query), returnTo(query), want)
	}
	for _, path := range []string{
		"//evil.com", `/\evil.com`, `\/evil.com`, `\\evil.com`, `/\/evil.com`, "/\t/evil.com", "/\v/evil.com",
		"/\n/evil.com", "/\r/evil.com", "/ \\evil.com", "/\t\\evil.com", "/\t\t\\\t/evil.com", `/./\evil.com`,
		"http:evil.com", ".evil.com", "@evil.com", ":80", ";alert(0);//", " /a", "\t/a", "/\x00/evil.com",
		"/\x7f/evil.com", "/\u0085/evil.com", "data:text/html,x", "%68%74%74%70%3a%2f%2fevil.com",
		"%19Jav%09asc%09ript:alert(1)",
	} {
		for _, query := range []string{"return_to=" + path, "return_to=" + url.QueryEscape(path)} {
			equal(t, fmt.Sprintf("returnTo(%q) =", query), returnTo(query), "")
		}
	}
}

// astray has what has led other programs to other sites, over the years, besides
// what TestReturnToTakesEveryPathOfThisSite has.
var astray = []string{
	"/ /evil.com", "/.//evil.com", "/..//evil.com", "/%09/evil.com", "/%0a/evil.com", "/%0d%0aLocation:x",
	"/%00/evil.com", "/%2fevil.com", "/%2f%2fevil.com", "/%5cevil.com", "/%5c%5cevil.com", "/%252fevil.com",
	"/%25252fevil.com", "/%255cevil.com", "/%2e%2e//evil.com", "/%2e/%2fevil.com", "/evil.com/%2f%2e%2e",
	"/\u3000/evil.com", "/\u00a0/evil.com", "/%e3%80%80/evil.com", "/\u2028/evil.com", "/\ufeff/evil.com",
	"/\u2044/evil.com", "/<>//evil.com", "/?url=//evil.com", "/#//evil.com", "/http://evil.com",
	"/https:///evil.com/%2e%2e", "/\xff/evil.com", "/@evil.com", "/:80", "/;//evil.com",
}
