package main

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
)

// beside lets h serve requests that prepare makes, a thousand at a time, and reports
// how much of the floor's rate it reaches: 1 is as fast. The floor is the cheapest
// handler of net/http.
func beside(b *testing.B, name string, h http.Handler, prepare func(i int) *http.Request) {
	each := func(name string, h http.Handler, least float64) (nanoseconds float64) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			requests := make([]*http.Request, 1000)
			for i := 0; b.Loop(); i++ {
				if i%len(requests) == 0 {
					b.StopTimer()
					for j := range requests {
						requests[j] = prepare(i + j)
					}
					b.StartTimer()
				}
				h.ServeHTTP(httptest.NewRecorder(), requests[i%len(requests)])
			}
			nanoseconds = float64(b.Elapsed()) / float64(b.N)
			if least > 0 {
				b.ReportMetric(least/nanoseconds, "of-floor")
			}
		})
		return nanoseconds
	}
	each(name, h, each(name+"/floor", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Write(make([]byte, 56))
	}), 0))
}

// BenchmarkServer has requests pass all of the server's handlers: polls without wait,
// signed SCANs that log in, and flow B's tickets with their pictures.
func BenchmarkServer(b *testing.B) {
	c, err := parseConfig(nil, with("MAX_TICKETS=100000000", "QR_RATE=0"))
	must(b, err)
	s := newServer(c, slog.New(slog.DiscardHandler))
	handler, begun := s.routes(), 0
	begin := func() (ticket string) {
		begun++
		ticket = "ticket" + strconv.Itoa(begun)
		must(b, s.tickets.begin(b.Context(), ticket, flowScan, "http://weixin.qq.com/q/x", asker{}))
		return ticket
	}
	for _, tickets := range []int{10, 1000, 100_000, 1_000_000} {
		for begun < tickets {
			begin()
		}
		beside(b, "poll/tickets="+strconv.Itoa(tickets), handler, func(i int) *http.Request {
			ticket := "ticket" + strconv.Itoa(1+i*7919%tickets)
			return httptest.NewRequest("GET", "/wechat/checklogin?ticket="+ticket, nil)
		})
	}
	beside(b, "push", handler, func(int) *http.Request {
		body := strings.NewReader(pushXML("openid", "SCAN", "scene", begin()))
		return httptest.NewRequest("POST", "/wechat/message?"+c.signedQuery().Encode(), body)
	})
	getThenDraw := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out := httptest.NewRecorder()
		handler.ServeHTTP(out, r)
		ticket := out.Body.String()[len(`{"ticket":"`):][:26]
		handler.ServeHTTP(w, httptest.NewRequest("GET", "/wechat/qr.png?ticket="+ticket, nil))
	})
	beside(b, "getauthqr", getThenDraw, func(int) *http.Request {
		return httptest.NewRequest("GET", "/wechat/getauthqr", nil)
	})
}
