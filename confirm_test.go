package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
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

// answerPhone answers a page that was shown long ago: with "yes", which is the right
// number, with "other", which is one of the wrong ones, or as it is said.
func (w *world) answerPhone(secret, answer string) string {
	k := parseKey(secret[:min(len(secret), 2*len(key{}))])
	switch numbers := choices(k, secret); {
	case answer == "yes":
		answer = number(k)
	case answer == "other":
		answer = numbers[(slices.Index(numbers, number(k))+1)%len(numbers)]
	}
	return w.submit("/wechat/confirm", "s", secret, "shown", "0", "answer", answer).Header().Get("Location")
}

func TestNobodyIsLoggedInBeforeThePhoneConfirms(t *testing.T) {
	const ok, failed = "/static/html/loginsucceed.html", "/static/html/loginfailed.html?reason="
	for _, begin := range []string{"getloginqr", "getauthqr"} {
		for answer, want := range map[string]struct {
			target string
			status status
		}{"yes": {ok, statusDone}, "no": {failed + "declined", statusDeclined}, "other": {failed + "number", statusDeclined}} {
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
	w.submit("/wechat/confirm", "s", secret, "shown", "0", "answer", number(digest(other)), "x", strings.Repeat("&", maxBody)) // a huge form
	if a, b := w.check(t, ticket, ""), w.check(t, other, ""); a.Status != statusScanned || b.Status != statusScanned {
		t.Errorf("%+v, %+v", a, b)
	}
}

var confirmField = regexp.MustCompile(`name="(\w+)" value="(\w+)"`)

// askedPhone opens the phone's page, and returns its form: the hidden fields, and
// the answers that can be pressed, from left to right and downwards.
func (w *world) askedPhone(secret string) (hidden, answers []string) {
	for _, field := range confirmField.FindAllStringSubmatch(w.do("GET", "/wechat/confirm?s="+secret, "").Body.String(), -1) {
		if field[1] == "answer" {
			answers = append(answers, field[2])
		} else {
			hidden = append(hidden, field[1], field[2])
		}
	}
	return hidden, answers
}

func TestThePhoneIsNotToldWhichNumberIsRight(t *testing.T) {
	w := newWorld(t, "CONFIRM=true", "QR_RATE=0")
	const times = 300
	twoDigits := regexp.MustCompile(`^[1-9][0-9]$`)
	var at [3]int // how often the right one is there
	for range times {
		ticket, secret := w.asked(t, "getauthqr")
		_, answers := w.askedPhone(secret)
		if len(answers) != 4 || answers[3] != "no" {
			t.Fatalf("answers %q", answers)
		}
		numbers := answers[:3]
		if !twoDigits.MatchString(numbers[0]) || !twoDigits.MatchString(numbers[1]) || !twoDigits.MatchString(numbers[2]) ||
			numbers[0] == numbers[1] || numbers[1] == numbers[2] || numbers[2] == numbers[0] {
			t.Errorf("numbers %q", numbers)
		}
		if _, again := w.askedPhone(secret); !slices.Equal(again, answers) {
			t.Errorf("at another look %q, before %q", again, answers)
		}
		place := slices.Index(numbers, w.check(t, ticket, "").Number)
		if place < 0 {
			t.Fatalf("the page's number is not among %q", numbers)
		}
		at[place]++
	}
	if slices.Min(at[:]) < times/5 {
		t.Errorf("the right number is there: %v", at)
	}
	k := digest("ticket") // of somebody who knows it, and all of our code
	clear(at[:])
	for i := range times {
		at[slices.Index(choices(k, k.String()+strconv.Itoa(i)), number(k))]++
	}
	if slices.Min(at[:]) < times/5 {
		t.Errorf("the ticket tells where the right number will be: %v", at)
	}
}

func TestAnswersWithinASecondDecideNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, begin := range []string{"getloginqr", "getauthqr"} {
			w := newWorld(t, "CONFIRM=true")
			ticket, secret := w.asked(t, begin)
			page := "/wechat/confirm?s=" + secret
			answer := func(fields ...string) string {
				return w.submit("/wechat/confirm", fields...).Header().Get("Location")
			}
			hidden, answers := w.askedPhone(secret)
			for _, at := range []time.Duration{0, 150 * time.Millisecond, 849 * time.Millisecond} { // 999 ms in all
				time.Sleep(at)
				for _, pressed := range answers {
					if got := answer(append(hidden, "answer", pressed)...); got != page {
						t.Errorf("%s: %q after %v leads to %s, want the page again", begin, pressed, at, got)
					}
				}
			}
			time.Sleep(time.Millisecond)
			later, _ := w.askedPhone(secret)
			right := number(digest(ticket))
			for name, fields := range map[string][]string{
				"to the page shown again":           append(later, "answer", right),
				"without a time":                    {"s", secret, "answer", right},
				"with a malformed time":             {"s", secret, "shown", "x", "answer", right},
				"with a time to come":               {"s", secret, "shown", strconv.FormatInt(time.Now().Add(time.Hour).UnixMilli(), 10), "answer", right},
				"with a time beyond all that count": {"s", secret, "shown", "9223372036854775807", "answer", right},
			} {
				if got := answer(fields...); got != page || w.check(t, ticket, "").Status != statusScanned {
					t.Errorf("%s: the right number %s leads to %s, and the login is %q", begin, name, got, w.check(t, ticket, "").Status)
				}
			}
			if got := answer(append(hidden, "answer", right)...); got != "/static/html/loginsucceed.html" || !w.check(t, ticket, "").Login {
				t.Errorf("%s: the right number after a second leads to %s", begin, got)
			}
		}
	})
}

func TestWhatThePageDoesNotAskForIsNoAnswer(t *testing.T) {
	w := newWorld(t, "CONFIRM=true")
	ticket, secret := w.asked(t, "getauthqr")
	_, numbers := w.askedPhone(secret)
	other := 10
	for slices.Contains(numbers, strconv.Itoa(other)) {
		other++
	}
	for _, answer := range []string{"", "YES", "No", "no ", " " + number(digest(ticket)), "0" + number(digest(ticket)), strconv.Itoa(other), "100", strings.Join(numbers, ",")} {
		if got := w.answerPhone(secret, answer); got != "/wechat/confirm?s="+secret || w.check(t, ticket, "").Status != statusScanned {
			t.Errorf("%q leads to %s, and the login is %q", answer, got, w.check(t, ticket, "").Status)
		}
	}
	if w.answerPhone(secret, "yes"); !w.check(t, ticket, "").Login {
		t.Error("the right number no longer counts")
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
		// The common browsers of China, which call themselves Chrome or Safari too.
		"Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 MQQBrowser/15.5 Mobile Safari/537.36":  "QQ, Android",
		"Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Quark/7.1 Mobile Safari/537.36":        "Quark, Android",
		"Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 UCBrowser/16.7 Mobile Safari/537.36":   "UC, Android",
		"Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 SogouMSE Mobile Safari/537.36":         "Sogou, Android",
		"Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 HuaweiBrowser/15 Mobile Safari/537.36": "Huawei, Android",
		"Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/86.0.0.0 Safari/537.36 360SE":          "360, Windows",
		"Mozilla/5.0 (Phone; OpenHarmony 5.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/114.0.0.0 Safari/537.36 ArkWeb/4":           "Chrome, HarmonyOS",
		"curl/8.5.0": "curl", "<script>": "Other", "": "Other", "Something (X11; Linux)": "Other, Linux",
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("User-Agent", agent)
		if got := (&server{config: config{confirm: true}}).asker(r).Browser; got != want {
			t.Errorf("%.40q: %q, want %q", agent, got, want)
		}
	}
}
