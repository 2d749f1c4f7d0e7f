package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const firefox = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:140.0) Gecko/20100101 Firefox/140.0"

// asked begins a login as a browser does, and lets alice scan. It returns the
// ticket, and the secret of the link that her phone gets.
func (w *world) asked(t *testing.T, begin string) (ticket, secret string) {
	t.Helper()
	var qr qrAnswer
	must(t, json.Unmarshal(w.do("GET", "/wechat/"+begin, "", "User-Agent", firefox, "peer", "203.0.113.7:1").Body.Bytes(), &qr))
	w.issued = append(w.issued, qr.Ticket)
	return qr.Ticket, w.claim(qr.Ticket)
}

// claim lets alice scan, and returns the secret of the link that she gets, if any.
func (w *world) claim(ticket string) (secret string) {
	_, shown := w.scan(ticket, "alice", "")
	if link := confirmLink.FindStringSubmatch(shown); link != nil {
		return link[1]
	}
	return ""
}

var confirmLink = regexp.MustCompile(`/wechat/confirm\?s=(\w+)`)

func (w *world) answerPhone(secret, answer string) string {
	return w.submit("/wechat/confirm", "s", secret, "answer", answer).Header().Get("Location")
}

func TestNobodyIsLoggedInBeforeThePhoneConfirms(t *testing.T) {
	const ok, failed = "/static/html/loginsucceed.html", "/static/html/loginfailed.html?reason="
	for _, begin := range []string{"getloginqr", "getauthqr"} {
		for answer, want := range map[string]struct {
			target string
			status status
		}{"yes": {ok, statusDone}, "no": {failed + "declined", statusDeclined}, "": {failed + "declined", statusDeclined}} {
			w := newWorld(t, "CONFIRM=true")
			ticket, secret := w.asked(t, begin)
			link := "/wechat/confirm?s=" + secret
			got := w.check(t, ticket, "")
			if got.Login || got.Status != statusScanned || got.OpenID != "" || got.Token != "" || len(got.Number) != 2 || got.ExpiresIn != 300 {
				t.Errorf("%s: after the scan: %+v", begin, got)
			}
			page := w.do("GET", link, "")
			for _, tell := range []string{"127.0.0.1:80", "Firefox, Windows", "203.0.113.7", ">" + got.Number + "<"} {
				if !strings.Contains(page.Body.String(), tell) {
					t.Errorf("%s: the phone is not told %q: %s", begin, tell, page.Body)
				}
			}
			w.do("GET", link, "") // to look decides nothing
			wrong := secret[:len(secret)-1] + "!"
			if got := w.answerPhone(wrong, "yes"); got != failed+"expired" || w.check(t, ticket, "").Login {
				t.Errorf("a wrong secret: %s", got)
			}
			if got := w.answerPhone(secret, answer); got != want.target {
				t.Errorf("%s, %q: %s, want %s", begin, answer, got, want.target)
			}
			if got := w.answerPhone(secret, "yes"); got != failed+"expired" {
				t.Errorf("the secret is good twice: %s", got)
			}
			got = w.check(t, ticket, "")
			if got.Status != want.status || got.Login != (want.status == statusDone) || (got.OpenID == "alice") != got.Login || (got.Token != "") != got.Login {
				t.Errorf("%s, %q: %+v, want %q", begin, answer, got, want.status)
			}
			if strings.Contains(w.logged.String(), secret) {
				t.Error("the secret is in the log")
			}
		}
	}
}

func TestSecretsOfOtherClaimsAndHugeFormsConfirmNothing(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, _ := w.asked(t, "getauthqr")
	other, secret := w.asked(t, "getauthqr")
	for _, sent := range []string{"", "x", digest(ticket).String(), digest(ticket).String() + secret[len(digest("").String()):], digest("unknown").String() + secret, ticket} {
		w.answerPhone(sent, "yes")
		if out := w.do("GET", "/wechat/confirm?s="+sent, ""); out.Code != http.StatusSeeOther {
			t.Errorf("%q is shown a page: %d", sent, out.Code)
		}
	}
	w.answerPhone(secret, "yes"+strings.Repeat("&", maxBody)+"&answer=yes") // a huge form
	if a, b := w.check(t, ticket, ""), w.check(t, other, ""); a.Status != statusScanned || b.Status != statusScanned {
		t.Errorf("%+v, %+v", a, b)
	}
}

func TestASecondScanChangesNoClaim(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, secret := w.asked(t, "getloginqr")
	if _, shown := w.scan(ticket, "bob", ""); strings.Contains(shown, "confirm") {
		t.Errorf("bob is asked to confirm alice's login: %s", shown)
	}
	if again := w.claim(ticket); again != secret {
		t.Errorf("alice has lost the link, scans again and gets %q, want %s", again, secret)
	}
	w.answerPhone(secret, "yes")
	if got := w.check(t, ticket, ""); got.OpenID != "alice" || w.claim(ticket) != "" {
		t.Errorf("%+v, or a link after the login", got)
	}
}

// With -race.
func TestThePhoneMayComeBackWhileItIsAsked(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	_, secret := w.asked(t, "getauthqr")
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { w.do("GET", "/wechat/accessusercode?code=again&state="+secret[:2*len(key{})], "") })
		wg.Go(func() { w.do("GET", "/wechat/confirm?s="+secret, "") })
	}
	wg.Wait()
}

func TestACallbackOpenedAgainTellsWhatWasDecided(t *testing.T) {
	for answer, want := range map[string]string{"yes": "loginsucceed.html", "no": "loginfailed.html?reason=declined"} {
		w := newWorld(t, "CONFIRM=true")
		callback := w.press(w.begin(t, "getauthqr").URL, "alice", "allow").Header().Get("Location")
		_, secret, _ := strings.Cut(w.do("GET", callback, "").Header().Get("Location"), "s=")
		w.answerPhone(secret, answer)
		if got := w.do("GET", callback, "").Header().Get("Location"); got != "/static/html/"+want {
			t.Errorf("after %q: %s, want %s", answer, got, want)
		}
	}
}

func TestClaimExpiresWithItsTicket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "CONFIRM=true")
		ticket, secret := w.asked(t, "getauthqr")
		time.Sleep(5 * time.Minute)
		if got := w.answerPhone(secret, "yes"); !strings.HasSuffix(got, "expired") || w.check(t, ticket, "").Status != statusExpired {
			t.Errorf("after its time: %s", got)
		}
	})
}

func TestPollHearsOfEachStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, "CONFIRM=true")
		qr := w.begin(t, "getauthqr")
		time.AfterFunc(3*time.Second, func() {
			secret := w.claim(qr.Ticket)
			time.Sleep(7 * time.Second)
			w.answerPhone(secret, "yes")
		})
		start := time.Now()
		for _, test := range []struct {
			wait string // and the status that the browser has seen
			want status
			at   time.Duration
		}{
			{"25", statusScanned, 3 * time.Second},
			{"25&status=pending", statusScanned, 3 * time.Second}, // it missed the step
			{"5&status=scanned", statusScanned, 8 * time.Second},
			{"1", statusScanned, 9 * time.Second}, // an old client is not answered in a hurry
			{"25&status=scanned", statusDone, 10 * time.Second},
			{"25&status=done", statusDone, 10 * time.Second},
		} {
			if got := w.check(t, qr.Ticket, test.wait); got.Status != test.want || time.Since(start) != test.at {
				t.Errorf("wait=%s: %q at %v, want %q at %v", test.wait, got.Status, time.Since(start), test.want, test.at)
			}
		}
	})
}

func TestDescribe(t *testing.T) {
	for agent, want := range map[string]string{
		firefox: "Firefox, Windows",
		"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36 Edg/140.0.0.0":     "Edge, macOS",
		"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.0 Safari/605.1.15":                   "Safari, macOS",
		"Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Mobile Safari/537.36 MicroMessenger/8.0.50":      "WeChat, Android",
		"Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.0 Mobile/15E148 Safari/604.1": "Safari, iPhone",
		"curl/8.5.0": "curl, ?", "<script>": "?, ?", "": "?, ?",
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("User-Agent", agent)
		if got := (&server{config: config{confirm: true}}).asker(r).Browser; got != want {
			t.Errorf("%.40q: %q, want %q", agent, got, want)
		}
	}
}
